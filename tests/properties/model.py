"""What an evaluator ought to do, said as simply as possible: no threads, no batches, no storage, no timers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evalkit import Job, JobCause, JobState, RetryPolicy
from evalkit.backends import Cancelled, Done, Event, Failed, Lost, Recorded, Rerun, Started, Task

__all__ = ["Expected", "Model"]

_FREE_LOSSES = 10


@dataclass
class Expected:
    """What is to be true of one job."""

    id: str
    number: int
    job: Job | None = None  # unknown of a job whose submit raised after it was taken in
    state: JobState = JobState.QUEUED
    in_backend: bool = False
    cause: JobCause | None = None
    output: Any = None
    attempt: int = 0
    dispatches: int = 0
    late: bool = False
    since: float | None = None
    losses: int = 0
    failures: Counter[JobCause] = field(default_factory=Counter)
    attempts: list[JobCause] = field(default_factory=list)  # why each run but the last did not count
    records: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0  # of these, of earlier attempts
    gathered: bool = False

    @property
    def ended(self) -> bool:
        return self.state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)

    def check(self, job: Job) -> None:
        """Whether the job is what it ought to be."""
        found = (job.id, job.state, job.cause, job.attempt)
        assert found == (self.id, self.state, self.cause, self.attempt), f"{job}, {self}"
        assert job.output == self.output
        assert job.records == self.records
        assert [(one.attempt, one.cause) for one in job.attempts] == list(enumerate(self.attempts))
        assert all(one.duration is not None and one.duration >= 0 for one in job.attempts)
        assert (job.error is not None) == (self.state is JobState.FAILED)
        status = job.status
        assert status.duration >= 0
        assert status.running_time >= 0
        assert status.completed == job.is_complete == job.wait(0) == self.ended


class Model:
    """The jobs of one evaluator.

    Args:
        now: the time.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self.jobs: dict[str, Expected] = {}
        self.finished: list[Expected] = []  # in the order of their ends, not gathered yet

    @property
    def out(self) -> list[Expected]:
        return [one for one in self.jobs.values() if not one.ended]

    def submitted(self, ids: list[str], jobs: list[Job] | None) -> None:
        for place, job_id in enumerate(ids):
            self.jobs[job_id] = Expected(job_id, len(self.jobs), None if jobs is None else jobs[place])

    def dispatched(self, task: Task) -> None:
        one = self.jobs[task.id]
        assert one.state is JobState.QUEUED, "what was cancelled or has ended was dispatched"
        assert task.attempt == one.attempt
        one.in_backend = True
        if isinstance(task, Job):
            one.job = task
        one.dispatches += 1

    def gathered(self, jobs: list[Job]) -> None:
        for job in jobs:
            one = self.jobs[job.id]
            assert one in self.finished, "gathered twice, or before its end"
            self.finished.remove(one)
            assert one.job is None or one.job is job, "another object than submit returned"
            one.job, one.gathered = job, True
            one.check(job)

    # -- what the backend tells -----------------------------------------------------------------------------------

    def sent(self, event: Event, now: float) -> None:
        one = self.jobs[event.job_id]
        if not one.in_backend:
            return  # it comes late
        if isinstance(event, Started):
            one.since = now
            if one.state is JobState.QUEUED:
                one.state = JobState.RUNNING
        elif isinstance(event, Recorded):
            one.records.append(event.values)
        elif isinstance(event, Rerun) and one.state is JobState.RUNNING and not one.late:
            one.state, one.since = JobState.QUEUED, None
            del one.records[one.kept :]
        elif isinstance(event, Done | Failed | Lost | Cancelled):
            self._run_over(one, event)

    def _run_over(self, one: Expected, event: Event) -> None:
        one.in_backend = False
        if one.state is JobState.CANCELLING or (isinstance(event, Cancelled) and not one.late):
            one.output = event.output if isinstance(event, Done) else None
            self._end(one, JobState.CANCELLED)
        elif one.late:
            one.output = event.output if isinstance(event, Done) else None
            self._fail(one, JobCause.TIMEOUT)
        elif isinstance(event, Done):
            one.output = event.output
            self._end(one, JobState.DONE)
        elif isinstance(event, Failed):
            self._fail(one, event.cause)
        elif one.losses < _FREE_LOSSES:
            one.losses += 1
            if one.state is JobState.RUNNING:
                self._again(one, JobCause.LOST)
        else:
            self._fail(one, JobCause.LOST)

    def _fail(self, one: Expected, cause: JobCause) -> None:
        allowed = {
            JobCause.EXCEPTION: self.policy.exception,
            JobCause.CRASH: self.policy.crash,
            JobCause.TIMEOUT: self.policy.timeout,
            JobCause.MEMORY: self.policy.memory,
            JobCause.LOST: self.policy.lost,
        }
        if one.state is JobState.RUNNING and one.failures[cause] < allowed[cause]:
            one.failures[cause] += 1
            self._again(one, cause)
        else:
            self._end(one, JobState.FAILED, cause)

    def _again(self, one: Expected, cause: JobCause) -> None:
        one.attempts.append(cause)
        one.kept = len(one.records)
        one.state, one.attempt, one.late, one.since, one.output = JobState.QUEUED, one.attempt + 1, False, None, None

    def _end(self, one: Expected, state: JobState, cause: JobCause | None = None) -> None:
        one.state, one.cause = state, cause
        self.finished.append(one)

    # -- what is asked for ----------------------------------------------------------------------------------------

    def cancel(self, one: Expected) -> str:
        """What ``job.cancel()`` is to return."""
        if one.ended:
            return "TOO_LATE"
        if one.state is JobState.CANCELLING:
            return "REQUESTED"
        ran = one.state is JobState.RUNNING
        if one.in_backend:
            one.state = JobState.CANCELLING
        else:
            self._end(one, JobState.CANCELLED)
        return "REQUESTED" if ran or one.in_backend else "CANCELLED"

    def cancel_all(self, goes_at_once: Callable[[Expected], bool]) -> None:
        """The search ends. What the backend drops at once is told of before the next one is cancelled."""
        for one in reversed(self.out):
            self.cancel(one)
            if goes_at_once(one):
                one.in_backend = False
                self._end(one, JobState.CANCELLED)
