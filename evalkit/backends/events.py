"""What a backend tells the evaluator about the jobs it was given."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evalkit.job import ErrorInfo, JobCause, Measured, WorkerIdentity
from evalkit.joblog import JobLog

__all__ = [
    "Cancelled",
    "Done",
    "DonePickled",
    "Ended",
    "Event",
    "Failed",
    "Lost",
    "Measured",
    "Pickled",
    "Printed",
    "Progress",
    "Recorded",
    "RecordedPickled",
    "Released",
    "Rerun",
    "Started",
    "WorkerIdentity",
]


@dataclass(slots=True)
class Started:
    """A job runs, since ``time`` (seconds since the Unix epoch).

    Told again for the same run, it is the better word on when that began. ``clock`` is the same instant on the
    monotonic clock, from a worker of this machine: ``job_timeout`` counts from it, or else from when this is told.
    """

    job_id: str
    time: float
    worker: WorkerIdentity | None = None
    clock: float | None = None


@dataclass(slots=True)
class Progress:
    """A running job reported how far it is."""

    job_id: str
    progress: float
    phase: str


@dataclass(slots=True)
class Pickled:
    """A value as it came from a worker: a pickle, and the large buffers that go with it."""

    data: bytes | memoryview
    buffers: Sequence[Any] = ()

    def load(self) -> Any:
        """Unpickle it. This may run any code, take any time, and raise anything, ``SystemExit`` included."""
        return pickle.loads(self.data, buffers=self.buffers)


@dataclass(slots=True)
class Recorded:
    """A running job recorded intermediate values."""

    job_id: str
    values: dict[str, Any]


@dataclass(slots=True)
class RecordedPickled:
    """As ``Recorded``, with values that the evaluator unpickles."""

    job_id: str
    values: Pickled


@dataclass(slots=True)
class Printed:
    """All that a job printed; shortly before its end."""

    job_id: str
    log: JobLog


@dataclass(slots=True)
class Ended:
    """The run function has returned, and its output is on the way: what that takes does not count as the run's time."""

    job_id: str
    measured: Measured


@dataclass(slots=True)
class Done:
    """The run function returned."""

    job_id: str
    output: Any
    measured: Measured | None = None
    worker: WorkerIdentity | None = None


@dataclass(slots=True)
class DonePickled:
    """As ``Done``, with an output that the evaluator unpickles: in a thread of its own, within a limit."""

    job_id: str
    output: Pickled
    measured: Measured | None = None
    worker: WorkerIdentity | None = None


@dataclass(slots=True)
class Failed:
    """The run ended without an output.

    With ``abandoned`` it counts as ended, and goes on: its resources are in use until ``Released`` is told.
    """

    job_id: str
    cause: JobCause
    error: ErrorInfo
    measured: Measured | None = None
    worker: WorkerIdentity | None = None
    abandoned: bool = False


@dataclass(slots=True)
class Cancelled:
    """The job ended without a result because that was asked for; mostly before it started."""

    job_id: str


@dataclass(slots=True)
class Lost:
    """The run ended by no fault of the job, which may not even have started: it is to run again."""

    job_id: str
    reason: str


@dataclass(slots=True)
class Rerun:
    """The run ended by no fault of the job, and the backend, which keeps the task, will run it again.

    It is no attempt of its own: what was said in it is dropped.
    """

    job_id: str


@dataclass(slots=True)
class Released:
    """A run that was abandoned has ended after all. Told where the task had resources, which are free from now on."""

    job_id: str
    attempt: int


Event = (
    Started
    | Progress
    | Recorded
    | RecordedPickled
    | Printed
    | Ended
    | Done
    | DonePickled
    | Failed
    | Cancelled
    | Lost
    | Rerun
    | Released
)
