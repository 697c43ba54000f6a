"""The states of a job, the one machine of their transitions, and what an end says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "LEGAL_TRANSITIONS",
    "TERMINAL_STATES",
    "CancelOutcome",
    "ErrorInfo",
    "JobCause",
    "JobState",
    "JobStatus",
]


class JobState(StrEnum):
    """Where a job is. Foreign spellings are read by :meth:`parse`."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    PRUNED = "PRUNED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUSPENDED = "SUSPENDED"
    UNKNOWN = "UNKNOWN"

    @classmethod
    def parse(cls, spelling: str) -> JobState:
        """Read a state as other systems spell it (any case); what nobody spells is UNKNOWN."""
        name = spelling.strip().upper().replace(" ", "_").replace("-", "_")
        return _SPELLINGS.get(name, cls.UNKNOWN)


_SPELLINGS: dict[str, JobState] = {state.value: state for state in JobState} | {
    "WAITING": JobState.QUEUED,
    "PENDING": JobState.QUEUED,
    "SUBMITTED": JobState.QUEUED,
    "STARTED": JobState.RUNNING,
    "SUCCESS": JobState.DONE,
    "COMPLETED": JobState.DONE,
    "ERROR": JobState.FAILED,
    "CRASHED": JobState.FAILED,
    "CANCELED": JobState.CANCELLED,
    "CANCEL_REQUESTED": JobState.CANCELLING,
}

TERMINAL_STATES = frozenset({JobState.DONE, JobState.FAILED, JobState.PRUNED, JobState.CANCELLED})

_REPORTED = frozenset({JobState.SUSPENDED, JobState.UNKNOWN})  # by remote systems; anything may follow them
#: What may follow what. RUNNING -> QUEUED is another attempt; QUEUED -> FAILED a job that could not even be sent.
LEGAL_TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLING, JobState.FAILED}) | _REPORTED,
    JobState.RUNNING: frozenset({JobState.DONE, JobState.FAILED, JobState.PRUNED, JobState.CANCELLING, JobState.QUEUED})
    | _REPORTED,
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUSPENDED: frozenset(JobState) - {JobState.SUSPENDED},
    JobState.UNKNOWN: frozenset(JobState) - {JobState.UNKNOWN},
    **dict.fromkeys(TERMINAL_STATES, frozenset()),
}


class JobCause(StrEnum):
    """Why a job failed."""

    EXCEPTION = "EXCEPTION"  # the run function raised, or its input or output could not travel
    CRASH = "CRASH"  # the worker died under it
    TIMEOUT = "TIMEOUT"  # it ran past job_timeout
    MEMORY = "MEMORY"  # it took more memory than it may
    LOST = "LOST"  # the machine it was on went away


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """What went wrong in a job, as text: it outlives the process that it happened in.

    Attributes:
        type: the qualified name of the exception's class, or ``WorkerDied`` and the like.
        message: what the exception said.
        traceback: the formatted traceback from where it was raised; empty if there is none.
        exit_code: of the worker, if it died by exiting.
        signal: the name of the signal that killed the worker, such as ``SIGKILL``.
    """

    type: str
    message: str
    traceback: str = ""
    exit_code: int | None = None
    signal: str | None = None

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A snapshot of a job. It never changes; ask the job for a new one.

    Attributes:
        progress: from 0 to 1, as the run function last reported.
        phase: the words it reported with it.
        stop_message: why the job was asked to stop, or why it ended early.
        creation_timestamp, start_timestamp, end_timestamp: seconds since the Unix epoch.
        duration: seconds from creation to the end, or to now.
        running_time: seconds from the start to the end, or to now; 0.0 before the start.
    """

    state: JobState
    progress: float
    phase: str
    stop_message: str | None
    cause: JobCause | None
    creation_timestamp: float
    start_timestamp: float | None
    end_timestamp: float | None
    duration: float
    running_time: float

    @property
    def waiting(self) -> bool:
        return self.state is JobState.QUEUED or self.state is JobState.SUSPENDED

    @property
    def running(self) -> bool:
        return self.state is JobState.RUNNING or self.state is JobState.CANCELLING

    @property
    def completed(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def success(self) -> bool:
        return self.state is JobState.DONE

    @property
    def failed(self) -> bool:
        return self.state is JobState.FAILED

    @property
    def canceled(self) -> bool:
        return self.state is JobState.CANCELLED

    @property
    def unknown(self) -> bool:
        return self.state is JobState.UNKNOWN


class CancelOutcome(StrEnum):
    """What a call of ``job.cancel()`` did."""

    CANCELLED = "CANCELLED"  # it does not run and never will
    REQUESTED = "REQUESTED"  # it runs, or may have begun to, and was asked to stop
    TOO_LATE = "TOO_LATE"  # it had ended before
