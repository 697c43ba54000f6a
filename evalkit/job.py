"""Job: one evaluation, from submit to its end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from evalkit.attempts import Attempt
from evalkit.errors import (
    IllegalTransitionError,
    JobCancelledError,
    JobFailedError,
    JobNotCompleteError,
)
from evalkit.joblog import JobLog
from evalkit.metadata import JobMetadata, Measured, MeasuredRuns, WorkerIdentity
from evalkit.objectives import is_failed_objective, objective_of
from evalkit.states import (
    LEGAL_TRANSITIONS,
    TERMINAL_STATES,
    CancelOutcome,
    ErrorInfo,
    JobCause,
    JobState,
    JobStatus,
)
from evalkit.usercode import attempt, entry_of, shown, text_of

__all__ = [
    "LEGAL_TRANSITIONS",
    "TERMINAL_STATES",
    "Attempt",
    "CancelOutcome",
    "ErrorInfo",
    "Job",
    "JobCause",
    "JobLog",
    "JobMetadata",
    "JobOwner",
    "JobState",
    "JobStatus",
    "Measured",
    "ReturnedRuns",
    "Run",
    "WorkerIdentity",
    "is_failed_objective",
    "objective_of",
]

_QUEUED, _RUNNING, _DONE = JobState.QUEUED, JobState.RUNNING, JobState.DONE
_registering = threading.Lock()  # of all jobs: whoever waits for an end by callback is rare


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

    def log_of(self, job: Job) -> JobLog | None:
        """What a running job has printed by now; None if that is not captured."""
        ...


class Run(Protocol):
    """How a run ended, as far as its job keeps it."""

    @property
    def measured(self) -> Measured | None: ...

    @property
    def worker(self) -> WorkerIdentity | None: ...


class ReturnedRuns(Protocol):
    """Runs of one worker that returned, as far as their jobs keep it."""

    @property
    def outputs(self) -> Sequence[Any]: ...

    @property
    def measured(self) -> MeasuredRuns: ...

    @property
    def worker(self) -> WorkerIdentity | None: ...


class _Said:
    """What there is to say of few jobs."""

    __slots__ = (
        "attempts",
        "captured",
        "cause",
        "error",
        "kept",
        "phase",
        "progress",
        "records",
        "resources",
        "stop_message",
    )

    def __init__(self) -> None:
        self.error: ErrorInfo | None = None
        self.cause: JobCause | None = None
        self.attempts: list[Attempt] = []
        self.resources: dict[str, str] = {}
        self.progress = 0.0
        self.phase = ""
        self.records: list[dict[str, Any]] | None = None
        self.kept = 0  # of these, of earlier attempts
        self.stop_message: str | None = None
        self.captured: JobLog | None = None


_NOTHING = _Said()


class Job:
    """One evaluation: a live handle, the same object from ``submit`` to ``gather``.

    Reading it is safe from any thread. The evaluator that owns it is the only one to call the methods of the last
    section.

    Attributes:
        id: ``"<search>.<number>"``.
        args: the parameters; the run function gets a copy.
        attempt: 0 for the first run, one more for each retry.
        output: what the run function returned; None until then. A number, ``"F_reason"``, a tuple, a mapping with
            ``objective`` and/or ``metadata``, or any object at all.
        number: its place in the order of submission, from 0, within its evaluator.
        in_backend: whether the backend of its owner has it now, to run it or to have it wait there.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_created",
        "_known",
        "_measured",
        "_owner",
        "_ran_by",
        "_row",
        "_said",
        "_state",
        "_told",
        "args",
        "attempt",
        "id",
        "in_backend",
        "number",
        "output",
    )

    def __init__(
        self, id: str, args: dict[str, Any], number: int = 0, created: float = 0.0, owner: JobOwner | None = None
    ) -> None:
        self.id = id
        self.args = args
        self.number = number
        self.attempt = 0
        self.in_backend = False
        self.output: Any = None
        self._created = created
        self._state = _QUEUED
        self._owner = owner
        # Of its last run, as it was told: a JobMetadata is made of it for who asks.
        self._measured: Measured | MeasuredRuns | None = None
        self._row: int  # its own in MeasuredRuns; unset where it has none
        self._ran_by: WorkerIdentity | None = None
        self._told: float | None = None
        self._known: JobMetadata | None = None
        self._said = _NOTHING  # until it says something
        self._callbacks: list[Callable[[Job], None]] | None = None

    def __repr__(self) -> str:
        end = (
            f", error={self.error}"
            if self.error is not None
            else f", output={shown(self.output)}"
            if self.is_complete
            else ""
        )
        return f"Job({self.id!r}, {self._state.value}, args={shown(self.args)}{end})"

    # -- what there is to read ------------------------------------------------------------------------------------

    @property
    def state(self) -> JobState:
        return self._state

    @property
    def status(self) -> JobStatus:
        """A snapshot: state, progress, times."""
        measured, said, owner, epoch = self.measured, self._said, self._owner, self._epoch
        start, end = measured.timestamp_start, measured.timestamp_end
        now = end if end is not None else measured.timestamp_submit if owner is None else owner.clock()
        return JobStatus(
            state=self._state,
            progress=1.0 if self._state is JobState.DONE else said.progress,
            phase=said.phase,
            stop_message=said.stop_message,
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
    def has_started(self) -> bool:
        """Whether its present attempt runs, or ran."""
        return self._measured is not None

    @property
    def objective(self) -> Any:
        """What :func:`objective_of` reads out of the output."""
        return objective_of(self.output)

    @property
    def objective_failed(self) -> bool:
        """Whether the function returned, and its objective says that the evaluation failed (``"F_…"``, NaN, ±inf)."""
        return is_failed_objective(self.objective)

    @property
    def error(self) -> ErrorInfo | None:
        """What went wrong, for a failed job."""
        return self._said.error

    @property
    def cause(self) -> JobCause | None:
        """The kind of failure, for a failed job."""
        return self._said.cause

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the run function recorded while it ran, in order; kept whatever becomes of the job."""
        return list(self._said.records or ())

    @property
    def recorded(self) -> list[dict[str, Any]] | None:
        """:attr:`records`; None if there never were any."""
        return None if self._said.records is None else self.records

    @property
    def attempts(self) -> list[Attempt]:
        """How the runs before its last went; empty if there was no other."""
        return list(self._said.attempts)

    @property
    def resources(self) -> dict[str, str]:
        """The units that its last run has, or had, to itself, by kind, such as ``{"gpu": "0"}``."""
        return self._said.resources.copy()

    @property
    def _epoch(self) -> float:
        return 0.0 if self._owner is None else self._owner.epoch

    @property
    def measured(self) -> JobMetadata:
        """What was measured of it so far; once it has ended, always the same object."""
        if self._known is not None:
            return self._known
        epoch = self._epoch
        start, end, cpu_time, peak_rss = self._last_run() or (None, None, None, None)
        known = JobMetadata(
            self._created,
            None if start is None else start - epoch,
            None if end is None else end - epoch,
            self._told,
            self._ran_by,
            self.attempt,
            cpu_time,
            peak_rss,
        )
        complete = self.is_complete
        if complete:
            known.extra = _metadata_in(self.output)
        if self._said is not _NOTHING:
            self._add_said(known)
        if complete:
            self._known = known
        return known

    def _last_run(self) -> Measured | None:
        measured = self._measured
        return measured.of(self._row) if isinstance(measured, MeasuredRuns) else measured

    def _add_said(self, known: JobMetadata) -> None:
        said = self._said
        extra: dict[str, Any] = {}
        if said.resources and self._measured is not None:
            extra["resources"] = said.resources.copy()
        if said.attempts:
            extra["attempts"] = [attempt.to_json() for attempt in said.attempts]
        if extra:
            known.extra = {**(known.extra or {}), **extra}

    @property
    def log(self) -> str:
        """What it printed, with the middle left out if that is long; while it runs, what it has printed by now.

        Empty where the backend does not capture it (``process`` does), and for a job that another evaluator has run:
        ``storage.load_log(job.id)`` has the log of every job that has ended.
        """
        log = self.printed
        return "" if log is None else str(log)

    @property
    def printed(self) -> JobLog | None:
        """The same as bytes, with how many of them are left out; None if there is nothing."""
        if self._said.captured is None and self._owner is not None and self.is_running:
            return self._owner.log_of(self) or self._said.captured  # it may have ended meanwhile
        return self._said.captured

    @property
    def metadata(self) -> dict[str, Any]:
        """A new dict of what was measured, of what the run function returned under ``"metadata"``, and for jobs that
        have some, of their ``resources`` and earlier ``attempts``.
        """
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
                f"job {self.id} is {self._state.value} ({self._said.stop_message or 'no reason given'}); "
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
        """Cancel it, from any thread; say what that did. What it had recorded comes back with it.

        Returns:
            CANCELLED if it does not run, and never will (an attempt before may have); REQUESTED if it runs, or may have
            begun to, and is asked to stop, then ended, as far as its backend can; TOO_LATE if it had ended before.
        """
        if self.is_complete or self._owner is None:
            return CancelOutcome.TOO_LATE
        return self._owner.cancel_job(self)

    # -- for its owner, who holds a lock around these -------------------------------------------------------------

    def move(self, state: JobState, stop_message: str | None = None) -> None:
        """Go to another live state.

        Raises:
            IllegalTransitionError: that state cannot follow the present one.
        """
        self._check_transition(state)
        self._state = state
        if stop_message is not None:
            self._say().stop_message = stop_message

    def _say(self) -> _Said:
        if self._said is _NOTHING:
            self._said = _Said()
        return self._said

    def _check_transition(self, state: JobState) -> None:
        if state not in LEGAL_TRANSITIONS[self._state]:
            raise IllegalTransitionError(
                f"job {self.id}: {self._state.value} -> {state.value} is not a legal transition"
            )

    def start(self, time: float, ran_by: WorkerIdentity | None = None) -> None:
        """It runs, since ``time`` (seconds since the Unix epoch); this may come after the news that it does."""
        if self._state is not _RUNNING and self._state is not JobState.CANCELLING:
            self.move(_RUNNING)
        self._measured, self._ran_by = (time, None, None, None), ran_by

    def lease(self, resources: dict[str, str]) -> None:
        """Its next run has these to itself."""
        self._say().resources = resources

    def retry(self, cause: JobCause, error: ErrorInfo, run: Run | None = None, told: float | None = None) -> None:
        """Back to the queue for another attempt; what the last one left is dropped, its records stay.

        Args:
            cause, error: why the last one did not count.
            run: that ended it; None if nothing is known of its end.
            told: when that was known, in seconds on the owner's clock.
        """
        self.move(_QUEUED)
        said, epoch = self._say(), self._epoch
        measured = run.measured if run is not None and run.measured is not None else self._last_run()
        ran_by = run.worker if run is not None and run.worker is not None else self._ran_by
        start = None if measured is None else measured[0] - epoch
        end = told if measured is None or measured[1] is None else measured[1] - epoch
        said.attempts.append(Attempt.ended(self.attempt, cause, error, ran_by, start, end, said.resources))
        said.resources = {}
        self.attempt += 1
        self.output = said.error = said.cause = self._measured = self._ran_by = None
        said.progress, said.phase, said.captured, said.kept = 0.0, "", None, len(said.records or ())

    def rerun(self) -> None:
        """Back to the queue, as if this attempt had not started."""
        self.move(_QUEUED)
        self._measured = self._ran_by = None
        if self._said is not _NOTHING:
            said = self._said
            said.progress, said.phase, said.captured = 0.0, "", None
            said.records = said.records and said.records[: said.kept]

    def finish(
        self,
        state: JobState,
        output: Any = None,
        error: ErrorInfo | None = None,
        cause: JobCause | None = None,
        run: Run | None = None,
        told: float | None = None,
    ) -> list[Callable[[Job], None]]:
        """Go to a terminal state with what it leaves behind.

        Args:
            run: that ended it; None if it ended without one.
            told: when that was known, in seconds on the owner's clock.

        Returns:
            the callbacks that wait for this, to be called without the lock.

        Raises:
            IllegalTransitionError: that state cannot follow the present one; the job is as it was.
        """
        present = self._state
        if run is None:
            measured = worker = None
        else:
            measured, worker = run.measured, run.worker
            if present is _QUEUED and (measured is not None or state is _DONE):
                present = _RUNNING  # over so soon that nobody told of its start
        if state not in LEGAL_TRANSITIONS[present]:
            self._check_transition(state)
        # What belongs to the end is in place before the state says that it has come: readers take no lock.
        self.output = output
        if error is not None or cause is not None:
            said = self._say()
            said.error, said.cause = error, cause
        self._told = told
        if worker is not None:
            self._ran_by = worker
        if measured is not None:
            self._measured = measured
        elif told is not None and (begun := self._last_run()) is not None:
            self._measured = begun[0], self._epoch + told, None, None
        self._state = state
        return [] if self._callbacks is None else self._take_callbacks()

    @staticmethod
    def finish_many(
        jobs: Iterable[Job | None],
        runs: ReturnedRuns,
        told: float,
        ended: list[Job],
        callbacks: list[tuple[Job, list[Callable[[Job], None]]]],
    ) -> None:
        """As :meth:`finish`, for jobs whose runs returned, in a third of the time.

        Args:
            jobs: one for each run, in their order; None, or one that its backend does not have any more, was given up.
            told: when that was known, in seconds on the owner's clock.
            ended: takes those that have ended.
            callbacks: takes the callbacks that wait for this, to be called without the lock.

        Raises:
            IllegalTransitionError: one of them cannot go there; those before it have ended.
        """
        measured, worker = runs.measured, runs.worker
        for row, (job, output) in enumerate(zip(jobs, runs.outputs, strict=True)):
            if job is None or not job.in_backend:
                continue
            if job._state is not _RUNNING and job._state is not _QUEUED:
                job._check_transition(_DONE)
            job.in_backend = False
            job.output = output
            job._told = told
            job._ran_by = worker
            job._row, job._measured = row, measured
            job._state = _DONE
            ended.append(job)
            if job._callbacks is not None:
                callbacks.append((job, job._take_callbacks()))

    def _take_callbacks(self) -> list[Callable[[Job], None]]:
        with _registering:
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
        self._state, self.output, self.attempt = state, output, attempt
        if error is not None or cause is not None or records:
            said = self._say()
            said.error, said.cause, said.records = error, cause, records or None
        self._known = JobMetadata.of(metadata)
        extra = self._known.extra
        if extra is not None:
            self._restore_said(extra)

    def _restore_said(self, extra: dict[str, Any]) -> None:
        # Run functions may return metadata of these names, of whatever kind.
        resources, attempts = extra.get("resources"), extra.get("attempts")
        if isinstance(resources, dict):
            self._say().resources = resources
        if isinstance(attempts, list):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                self._say().attempts = [Attempt.of(attempt) for attempt in attempts]

    def note_progress(self, progress: float, phase: str) -> None:
        said = self._say()
        said.progress, said.phase = progress, phase

    def note_record(self, values: dict[str, Any]) -> None:
        said = self._say()
        if said.records is None:
            said.records = []
        said.records.append(values)

    def note_log(self, log: JobLog) -> None:
        self._say().captured = log

    def when_complete(self, callback: Callable[[Job], None]) -> None:
        """Have ``callback(job)`` called once, at the end, from whatever thread brings it; here and now if it has ended.

        Safe from any thread.
        """
        with _registering:
            self._callbacks = [*(self._callbacks or ()), callback]
        # The end sets the state before it takes the callbacks, so one of the two sees the other.
        if self.is_complete:
            for waiting in self._take_callbacks():
                waiting(self)


def _metadata_in(output: Any) -> dict[str, Any] | None:
    """What the run function returned as metadata, if that can be read; it stays in the output in any case."""
    if type(output) is not dict or not output:
        return None
    given = entry_of(output, "metadata")
    return None if given is None else attempt(_named, given)[0]


def _named(given: Any) -> dict[str, Any] | None:
    if not isinstance(given, Mapping):
        return None
    return {key if type(key) is str else text_of(key): value for key, value in given.items()}
