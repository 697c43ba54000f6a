"""Job: one evaluation, from submit to its end, and the one machine of its states."""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from evalkit.errors import (
    IllegalTransitionError,
    JobCancelledError,
    JobFailedError,
    JobNotCompleteError,
)

__all__ = [
    "LEGAL_TRANSITIONS",
    "TERMINAL_STATES",
    "CancelOutcome",
    "ErrorInfo",
    "Job",
    "JobCause",
    "JobMetadata",
    "JobOwner",
    "JobState",
    "JobStatus",
    "is_failed_objective",
    "objective_of",
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

    CANCELLED = "CANCELLED"  # it never ran and never will
    REQUESTED = "REQUESTED"  # it runs, and was asked to stop
    TOO_LATE = "TOO_LATE"  # it had ended before


class JobOwner(Protocol):
    """What a live job asks of the evaluator that holds it."""

    @property
    def epoch(self) -> float:
        """Seconds since the Unix epoch at which the owner's clock reads 0."""
        ...

    def clock(self) -> float:
        """Seconds since :attr:`epoch`."""
        ...

    def cancel_job(self, job: Job) -> CancelOutcome: ...

    def wait_job(self, job: Job, timeout: float | None) -> bool: ...


class JobMetadata(Mapping[str, Any]):
    """Where, when and at what cost a job ran; a compact mapping that shows only what is known.

    Timestamps are seconds since the evaluator was created, ``duration`` and ``cpu_time`` are seconds, ``peak_rss`` is
    bytes. ``extra`` holds what the run function returned under ``"metadata"``.
    """

    __slots__ = (
        "attempt",
        "cpu_time",
        "extra",
        "host",
        "peak_rss",
        "pid",
        "timestamp_end",
        "timestamp_gather",
        "timestamp_start",
        "timestamp_submit",
        "worker",
    )

    KEYS = (
        "timestamp_submit",
        "timestamp_start",
        "timestamp_end",
        "timestamp_gather",
        "host",
        "pid",
        "worker",
        "attempt",
        "duration",
        "cpu_time",
        "peak_rss",
    )

    def __init__(self, timestamp_submit: float) -> None:
        self.timestamp_submit = timestamp_submit
        self.timestamp_start: float | None = None
        self.timestamp_end: float | None = None
        self.timestamp_gather: float | None = None
        self.host: str | None = None
        self.pid: int | None = None
        self.worker: str | None = None
        self.attempt = 0
        self.cpu_time: float | None = None
        self.peak_rss: int | None = None
        self.extra: dict[str, Any] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JobMetadata:
        """The inverse of ``dict(metadata)``."""
        metadata = cls(values.get("timestamp_submit", 0.0))
        for key, value in values.items():
            if key in cls.__slots__ and key != "extra":
                setattr(metadata, key, value)
            elif key != "duration":
                metadata.extra = (metadata.extra or {}) | {key: value}
        return metadata

    @property
    def duration(self) -> float | None:
        """Seconds from start to end."""
        if self.timestamp_start is None or self.timestamp_end is None:
            return None
        return self.timestamp_end - self.timestamp_start

    def __getitem__(self, key: str) -> Any:
        if self.extra is not None and key in self.extra:
            return self.extra[key]
        value = getattr(self, key) if key in self.KEYS else None
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        extra = self.extra or {}
        for key in self.KEYS:
            if key not in extra and getattr(self, key) is not None:
                yield key
        yield from extra

    def __len__(self) -> int:
        return sum(1 for _ in self)


def objective_of(output: Any) -> Any:
    """Read the objective out of what a run function returned.

    Returns:
        a number as it is; a tuple or list of numbers as a tuple; a string ``"F_…"`` as it is (a failed evaluation that the
        user reported); for a mapping, what stands under ``"objective"``; None for anything else.
    """
    if isinstance(output, Mapping):
        output = output.get("objective")
    if isinstance(output, str):
        return output if output.startswith("F_") else None
    if isinstance(output, numbers.Number):
        return output
    if isinstance(output, tuple | list) and output and all(isinstance(one, numbers.Number) for one in output):
        return tuple(output)
    return None


def is_failed_objective(objective: Any) -> bool:
    """Whether an objective says that the evaluation failed: ``"F_…"``, NaN or ±inf, alone or among several."""
    if isinstance(objective, str):
        return objective.startswith("F_")
    if isinstance(objective, tuple):
        return any(is_failed_objective(one) for one in objective)
    return isinstance(objective, numbers.Real) and not math.isfinite(objective)


class Job:
    """One evaluation: a live handle, the same object from ``submit`` to ``gather``.

    Reading it is safe from any thread. The evaluator that owns it is the only one to call the methods of the last section.

    Attributes:
        id: ``"<search>.<number>"``.
        args: the parameters; the run function gets a copy.
        attempt: 0 for the first run, one more for each retry.
        output: what the run function returned; None until then. A number, ``"F_reason"``, a tuple, a mapping with
            ``objective`` and/or ``metadata``, or any object at all.
        error: what went wrong, for a failed job.
        cause: the kind of failure, for a failed job.
        number: its place in the order of submission, from 0, within its evaluator.
        measured: what was measured of it; ``metadata`` is the dict of the same.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_owner",
        "_phase",
        "_progress",
        "_records",
        "_state",
        "_stop_message",
        "args",
        "attempt",
        "cause",
        "error",
        "id",
        "measured",
        "number",
        "output",
    )

    def __init__(
        self, id: str, args: dict[str, Any], *, number: int = 0, created: float = 0.0, owner: JobOwner | None = None
    ) -> None:
        self.id = id
        self.args = args
        self.number = number
        self.attempt = 0
        self.output: Any = None
        self.error: ErrorInfo | None = None
        self.cause: JobCause | None = None
        self.measured = JobMetadata(created)
        self._state = JobState.QUEUED
        self._owner = owner
        self._progress = 0.0
        self._records: list[dict[str, Any]] | None = None
        self._phase = ""
        self._stop_message: str | None = None
        self._callbacks: list[Callable[[Job], None]] | None = None

    def __repr__(self) -> str:
        end = f", error={self.error}" if self.error is not None else f", output={self.output!r}" if self.is_complete else ""
        return f"Job({self.id!r}, {self._state.value}, args={self.args!r}{end})"

    # -- what there is to read ------------------------------------------------------------------------------------

    @property
    def state(self) -> JobState:
        return self._state

    @property
    def status(self) -> JobStatus:
        """A snapshot: state, progress, times."""
        measured, owner = self.measured, self._owner
        epoch = 0.0 if owner is None else owner.epoch
        start, end = measured.timestamp_start, measured.timestamp_end
        now = end if end is not None else measured.timestamp_submit if owner is None else owner.clock()
        return JobStatus(
            state=self._state,
            progress=1.0 if self._state is JobState.DONE else self._progress,
            phase=self._phase,
            stop_message=self._stop_message,
            cause=self.cause,
            creation_timestamp=epoch + measured.timestamp_submit,
            start_timestamp=None if start is None else epoch + start,
            end_timestamp=None if end is None else epoch + end,
            duration=max(0.0, now - measured.timestamp_submit),
            running_time=0.0 if start is None else max(0.0, now - start),
        )

    @property
    def is_waiting(self) -> bool:
        return self._state is JobState.QUEUED or self._state is JobState.SUSPENDED

    @property
    def is_running(self) -> bool:
        return self._state is JobState.RUNNING or self._state is JobState.CANCELLING

    @property
    def is_complete(self) -> bool:
        return self._state in TERMINAL_STATES

    @property
    def is_success(self) -> bool:
        return self._state is JobState.DONE

    @property
    def is_failed(self) -> bool:
        return self._state is JobState.FAILED

    @property
    def objective(self) -> Any:
        """What :func:`objective_of` reads out of the output."""
        return objective_of(self.output)

    @property
    def objective_failed(self) -> bool:
        """Whether the function returned, and its objective says that the evaluation failed (``"F_…"``, NaN, ±inf)."""
        return is_failed_objective(self.objective)

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the run function recorded while it ran, in order; kept whatever becomes of the job."""
        return [] if self._records is None else list(self._records)

    @property
    def metadata(self) -> dict[str, Any]:
        """A new dict of what was measured and of what the run function returned under ``"metadata"``."""
        return dict(self.measured)

    # -- what there is to do --------------------------------------------------------------------------------------

    def get_results(self) -> Any:
        """The output, now.

        Raises:
            JobNotCompleteError: it has not ended yet.
            JobFailedError: it failed; the message carries the remote traceback.
            JobCancelledError: it was cancelled or pruned; what it recorded is in ``records``.
        """
        if self._state is JobState.DONE:
            return self.output
        if self._state is JobState.FAILED:
            detail = "" if self.error is None else f": {self.error}\n{self.error.traceback}".rstrip()
            raise JobFailedError(f"job {self.id} failed ({self.cause}){detail}", self)
        if self.is_complete:
            raise JobCancelledError(
                f"job {self.id} is {self._state.value} ({self._stop_message or 'no reason given'}); "
                f"{len(self.records)} recorded values are in job.records",
                self,
            )
        raise JobNotCompleteError(f"job {self.id} is {self._state.value}; wait for it with job.result()", self)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the output.

        Args:
            timeout: how long to wait, in seconds; None waits as long as the job takes.

        Raises:
            TimeoutError: it did not end in that time.
            JobFailedError, JobCancelledError: as :meth:`get_results`.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"job {self.id} is still {self._state.value} after {timeout} s")
        return self.get_results()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most ``timeout`` seconds; say whether it came."""
        if self.is_complete:
            return True
        if self._owner is None:
            raise JobNotCompleteError(f"job {self.id} is {self._state.value} and no evaluator holds it", self)
        return self._owner.wait_job(self, timeout)

    def cancel(self) -> CancelOutcome:
        """Cancel it, from any thread; say what that did."""
        if self.is_complete or self._owner is None:
            return CancelOutcome.TOO_LATE
        return self._owner.cancel_job(self)

    # -- for its owner, who holds a lock around these -------------------------------------------------------------

    def move(self, state: JobState, stop_message: str | None = None) -> None:
        """Go to another live state.

        Raises:
            IllegalTransitionError: that state cannot follow the present one.
        """
        if state not in LEGAL_TRANSITIONS[self._state]:
            raise IllegalTransitionError(f"job {self.id}: {self._state.value} -> {state.value} is not a legal transition")
        self._state = state
        if stop_message is not None:
            self._stop_message = stop_message

    def start(self, timestamp: float) -> None:
        """It runs, since ``timestamp`` (seconds on the owner's clock)."""
        self.move(JobState.RUNNING)
        self.measured.timestamp_start = timestamp

    def retry(self) -> None:
        """Back to the queue for another attempt; what the last one left is dropped, its records stay."""
        self.move(JobState.QUEUED)
        self.attempt += 1
        self.output = self.error = self.cause = None
        self.measured.timestamp_start = self.measured.timestamp_end = None
        self._progress, self._phase = 0.0, ""

    def finish(
        self,
        state: JobState,
        *,
        output: Any = None,
        error: ErrorInfo | None = None,
        cause: JobCause | None = None,
        stop_message: str | None = None,
    ) -> list[Callable[[Job], None]]:
        """Go to a terminal state with what it leaves behind.

        Returns:
            the callbacks that wait for this, to be called without the lock.
        """
        # What belongs to the end is in place before the state says that it has come: readers take no lock.
        self.output = output
        self.error = error
        self.cause = cause
        self.measured.attempt = self.attempt
        if type(output) is dict and isinstance(output.get("metadata"), Mapping):
            self.measured.extra = {str(key): value for key, value in output["metadata"].items()}
        self.move(state, stop_message)
        callbacks, self._callbacks = self._callbacks, None
        return callbacks or []

    def restore(
        self,
        state: JobState,
        output: Any,
        error: ErrorInfo | None,
        cause: JobCause | None,
        attempt: int,
        records: list[dict[str, Any]],
        metadata: Mapping[str, Any],
    ) -> None:
        """Take over what a storage kept of it."""
        self._state, self.output, self.error, self.cause, self.attempt = state, output, error, cause, attempt
        self._records = records or None
        self.measured = JobMetadata.of(metadata)

    def note_progress(self, progress: float, phase: str) -> None:
        self._progress, self._phase = progress, phase

    def note_record(self, values: dict[str, Any]) -> None:
        if self._records is None:
            self._records = []
        self._records.append(values)

    def when_complete(self, callback: Callable[[Job], None]) -> None:
        """Have ``callback(job)`` called at the end, from whatever thread brings it."""
        self._callbacks = [*(self._callbacks or ()), callback]
