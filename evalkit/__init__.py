"""evalkit: run a function over many parameter sets on any engine, with one contract, and lose nothing."""

from evalkit.callbacks.base import Callback
from evalkit.engine.retry import RetryPolicy
from evalkit.errors import EvalkitError
from evalkit.evaluator import Evaluator
from evalkit.job import Attempt, CancelOutcome, ErrorInfo, Job, JobCause, JobState, JobStatus
from evalkit.running import RunningJob, call_with_kwargs
from evalkit.version import __version__

__all__ = [
    "Attempt",
    "Callback",
    "CancelOutcome",
    "ErrorInfo",
    "EvalkitError",
    "Evaluator",
    "Job",
    "JobCause",
    "JobState",
    "JobStatus",
    "RetryPolicy",
    "RunningJob",
    "__version__",
    "call_with_kwargs",
]
