"""Scheduler: holds every job that is out, feeds the backend, and turns what it tells into the states of jobs.

::

    admit ─▶ pending ──pump──▶ in the backend ──emit──▶ finished ──take──▶ gather
                ▲                     │
                └──── retry, lost ────┘

One lock guards it all; nothing is called under it but the jobs' own methods. What has ended and was gathered is
forgotten, so no step depends on how many jobs there were.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from evalkit.backends.base import Backend, Task
from evalkit.backends.done_batch import DoneBatch
from evalkit.backends.events import (
    Cancelled,
    Done,
    DonePickled,
    Ended,
    Event,
    Failed,
    Lost,
    Printed,
    Progress,
    Recorded,
    RecordedPickled,
    Released,
    Rerun,
    Started,
)
from evalkit.backends.execution import describe
from evalkit.engine.clock import Clock
from evalkit.engine.endings import Endings
from evalkit.engine.notifier import Notifier
from evalkit.engine.recorder import Recorder
from evalkit.engine.resources import Resources
from evalkit.engine.retry import Retries, RetryPolicy
from evalkit.engine.unpickling import UnpicklingThread
from evalkit.engine.waiting import AllWaiter, JobWaiter, Waiter
from evalkit.errors import SearchStoppedError
from evalkit.interrupts import InterruptHeld
from evalkit.job import CancelOutcome, ErrorInfo, Job, JobCause, JobLog, JobState

__all__ = ["Scheduler"]

_log = logging.getLogger("evalkit")
_id = attrgetter("id")
# To read a member off its class takes 70 ns, and every job asks for some.
_QUEUED, _RUNNING, _DONE, _FAILED = JobState.QUEUED, JobState.RUNNING, JobState.DONE, JobState.FAILED
_CANCELLING, _CANCELLED = JobState.CANCELLING, JobState.CANCELLED
#: Events that do not wait for records that are still being unpickled: they say that a run is over.
_AT_ONCE = frozenset({DonePickled, Ended, Released})


class Scheduler:
    """Holds the jobs of one evaluator between submit and gather. It is the :class:`evalkit.job.JobOwner` of its jobs.

    Args:
        epoch: seconds since the Unix epoch at which its clock reads 0.
        job_timeout: seconds that a run may take; None for no limit.
        output_timeout: seconds that the output of a run may take to arrive, and to be unpickled.
        grace: seconds between asking a job to stop and its end by force.
        resources: what running jobs have to themselves; None for nothing.
    """

    def __init__(
        self,
        backend: Backend,
        recorder: Recorder,
        notifier: Notifier,
        timers: Clock,
        *,
        epoch: float,
        retries: RetryPolicy,
        job_timeout: float | None,
        output_timeout: float,
        grace: float,
        resources: Resources | None = None,
    ) -> None:
        self._backend = backend
        self._recorder = recorder
        recorder.on_written = self.pump
        self._notifier = notifier
        self._timers = timers
        self.epoch = epoch
        self._lock = threading.Lock()
        self._retries = Retries(retries)
        self._endings = Endings(
            backend, timers, self._lock, job_timeout=job_timeout, output_timeout=output_timeout, grace=grace
        )
        self._unpickling = UnpicklingThread(self._opened, timers, output_timeout)
        self._unopened: dict[str, int] = {}  # job -> how many of its events are there, and not back yet
        self._returned: set[str] = set()  # jobs whose runs are over, and whose outputs are there and unopened
        self._timed = job_timeout is not None
        self._dooms = self._endings.dooms
        self._resources = resources
        self._dispatching = threading.Lock()
        self._pump_again = False
        self._out: dict[str, Job] = {}
        self._pending: deque[Job] = deque()
        self._withdrawn = False  # whether there may be some among these that were cancelled
        self._in_backend = 0  # how many of those that are out
        self._finished: dict[int, Job] = {}  # by number: a large dict of strings looks at all of them as it grows
        self._waiters: list[Waiter] = []
        self._last_number = -1
        self._admitted = 0
        self._closed_because: str | None = None
        self._handlers: dict[type, Callable[[_Turn, Job, Any], None]] = {
            Done: self._on_done,
            DonePickled: self._end_later,
            Ended: self._on_ended,
            Started: self._on_started,
            Progress: self._on_progress,
            Recorded: self._on_recorded,
            RecordedPickled: self._open_later,
            Printed: self._on_printed,
            Failed: self._on_failed,
            Cancelled: self._on_cancelled,
            Lost: self._on_lost,
            Rerun: self._on_rerun,
            Released: self._on_released,
        }

    # -- what the evaluator asks ----------------------------------------------------------------------------------

    def clock(self) -> float:
        """Seconds since :attr:`epoch`."""
        return time.time() - self.epoch

    @property
    def gathered(self) -> int:
        """How many jobs have ended and were taken."""
        with self._lock:
            return self._admitted - len(self._out) - len(self._finished)

    def admit(self, jobs: Sequence[Job], *, begun: bool = False) -> None:
        """Take these jobs in and start what can start.

        Args:
            begun: they belong to others that were taken in: if the intake is closed, they are taken in and cancelled.

        Raises:
            SearchStoppedError: the intake is closed; none of them was taken in.
        """
        with self._lock:
            closed = self._closed_because
            if closed is not None and not begun:
                raise SearchStoppedError(closed)
            self._out.update(zip(map(_id, jobs), jobs, strict=True))
            self._pending.extend(jobs)
            self._last_number = jobs[-1].number
            self._admitted += len(jobs)
            if self._notifier.active:
                self._notifier.post("on_launch", jobs)
        if closed is not None:
            for job in jobs:
                self._cancel(job, closed)
        if self._notifier.inline:
            self._notifier.drain()
        self.pump()

    def close_intake(self, reason: str, *, running: bool = True) -> list[Job]:
        """Take nothing in from now on, and cancel every job that is out; return those that had not ended.

        Args:
            running: False leaves what runs alone; nothing starts any more, no other attempt either.
        """
        self._backend.tell()  # whether a job runs makes a difference
        with self._lock:
            if self._closed_because is None:
                self._closed_because = reason
            jobs = [job for job in self._out.values() if running or job.state is _QUEUED]
            returned = self._returned.copy()
        # The last first: none of them may start because those before it went.
        for job in reversed(jobs):
            if job.id not in returned:
                self._cancel(job, reason)
        return jobs

    def open_intake(self) -> None:
        """Take jobs in again."""
        with self._lock:
            self._closed_because = None

    def wait(self, waiter: Waiter, timeout: float | None = None) -> bool:
        """Wait until this is released, at most ``timeout`` seconds; say whether that came.

        Who is interrupted, here or before it has made use of what the waiter was given, calls :meth:`undo`.
        """
        with self._lock:
            waiter.begin(len(self._out), len(self._finished), self._last_number)
            if waiter.satisfied(len(self._finished), len(self._out)):
                waiter.release(self._finished)
            else:
                self._waiters.append(waiter)
        return self._wait(waiter, timeout)

    def undo(self, waiter: Waiter) -> None:
        """It is given nothing more from here on, and what it was given is for the next who gathers."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if waiter.jobs:
                self._put_back(waiter.jobs)

    def wait_job(self, job: Job, timeout: float | None) -> bool:
        """Wait for one job; say whether it has ended."""
        waiter = JobWaiter(job)
        try:
            return self.wait(waiter, timeout)
        finally:
            self.undo(waiter)

    def take(self, job: Job) -> bool:
        """Take one job that has ended; say whether nobody had taken it before."""
        with self._lock:
            if self._finished.get(job.number) is not job:  # it may be another evaluator's
                return False
            del self._finished[job.number]
            return True

    def put_back(self, job: Job) -> None:
        """Undo taking: the next gather returns it."""
        with self._lock:
            self._put_back([job])

    def cancel_job(self, job: Job) -> CancelOutcome:
        with InterruptHeld():
            return self._cancel(job, "cancelled by the user")

    def log_of(self, job: Job) -> JobLog | None:
        return self._backend.log_of(job.id)

    def kill_all(self, reason: str) -> None:
        """Take nothing in from now on, and end all that is out by force."""
        self.close_intake(reason)
        with self._lock:
            running = [job.id for job in self._out.values() if job.in_backend]
        for job_id in running:
            self._backend.cancel(job_id, kill=True)

    def give_up(self, reason: str) -> None:
        """The backend has stopped: what has not ended by now never will."""
        turn = _Turn(self.clock())
        with self._lock:
            for job in list(self._out.values()):
                job.in_backend = False
                if job.state is not _CANCELLING:
                    job.move(_CANCELLING, reason)
                self._end(turn, job, _CANCELLED)
            self._pending.clear()
            self._in_backend = 0
            self._conclude(turn)
        self._unpickling.close()
        self._tell(turn)

    # -- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, waiter: Waiter, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._backend.runs_in_caller:
            if not waiter.done:
                self._backend.lend(lambda: waiter.done, timeout)
            return waiter.wait(None if deadline is None else deadline - time.monotonic())
        # With callbacks one job at a time, so that what they decide holds for the next.
        limit = 1 if self._notifier.active or not isinstance(waiter, AllWaiter) else 256
        while not waiter.done:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._backend.step(limit, left):
                continue
            if self._pending and self._recorder.unwritten and not self._recorder.away:
                self._recorder.write()  # what waits to start waits for that
            elif not waiter.done:
                # Nothing to run here and now: another thread is submitting, or a retry waits for its time.
                waiter.wait(0.05 if left is None else min(left, 0.05))
        return True

    def _put_back(self, jobs: Iterable[Job]) -> None:
        self._finished = {job.number: job for job in jobs} | self._finished
        self._release_waiters()

    def _release_waiters(self) -> None:
        """First come, first served: what one is given, the next does not count on."""
        if self._waiters:
            for waiter in tuple(self._waiters):
                if waiter.satisfied(len(self._finished), len(self._out)):
                    self._waiters.remove(waiter)
                    waiter.release(self._finished)

    # -- feeding the backend --------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Give the backend what it has room for. One thread does it at a time; who comes meanwhile has it done once
        more.
        """
        while True:
            self._pump_again = True
            if not self._dispatching.acquire(blocking=False):
                return
            try:
                self._pump_again = False
                batch = self._next_batch()
                if batch:
                    self._dispatch(batch)
                    # Who cancelled one of them a moment ago may have asked a backend that did not know it yet.
                    for task in batch if self._dooms else ():
                        if task.id in self._dooms:
                            self._backend.cancel(task.id, kill=False)
                elif self._resources is not None and self._pending:
                    self._resources.warn_if_stuck()
            finally:
                self._dispatching.release()
            if not (self._pump_again or (batch and self._pending)):
                return

    def _dispatch(self, batch: Sequence[Task]) -> None:
        try:
            self._backend.dispatch(batch)
        except Exception as exc:  # noqa: BLE001 - whoever submits would pay for it, and whoever gathers would hang
            _log.exception("the backend did not take %d jobs", len(batch))
            error = describe(exc)
            self.emit([Failed(job.id, JobCause.LOST, error) for job in batch])

    def _next_batch(self) -> Sequence[Task]:
        pending = self._pending
        if not pending:
            return []
        with self._lock:
            if self._closed_because is not None:
                return []  # all of them are being cancelled; what goes makes no room for another attempt
            resources = self._resources
            room = self._backend.capacity - self._in_backend
            if self._recorder.durable and not self._recorder.away:
                room = min(room, self._room_in_storage())
            if resources is not None:
                # What waited in the backend would keep from others what it does not use yet.
                at_once = 1 if self._backend.runs_in_caller else self._backend.num_workers
                room = min(room, at_once - self._in_backend, resources.free)
            batch: list[Job] = []
            while pending and len(batch) < room:
                if room - len(batch) >= len(pending):
                    first = list(pending)
                    pending.clear()
                else:
                    first = [pending.popleft() for _ in range(room - len(batch))]
                batch += [job for job in first if job.state is _QUEUED] if self._withdrawn else first
            if not pending:
                self._withdrawn = False
            for job in batch:
                job.in_backend = True
            self._in_backend += len(batch)
            return batch if resources is None else [resources.lease(job) for job in batch]

    def _room_in_storage(self) -> int:
        """With the lock: how many jobs may start, so that no more are running or unwritten than there are workers: a
        kill has a resume run these again.
        """
        unwritten = self._recorder.unwritten
        if unwritten and not self._backend.runs_in_caller:
            self._recorder.hurry()
        return self._backend.num_workers - self._in_backend - len(self._returned) - unwritten

    # -- what the backend tells -----------------------------------------------------------------------------------

    def emit(self, events: Sequence[Event]) -> None:
        """What happened, in order. Called by the backend, from any thread."""
        self._take_turn(self._handle, events)

    def _opened(self, event: Event, opened: Event) -> None:
        """An event was in the hands of the unpickling thread. Called by that."""
        self._take_turn(self._handle_opened, event, opened)

    def _take_turn(self, handle: Callable[..., None], *subjects: Any) -> None:
        turn = _Turn(self.clock())
        try:
            with self._lock:
                try:
                    handle(turn, *subjects)
                finally:
                    self._conclude(turn)
        finally:
            self._tell(turn)
            if self._pending:
                self.pump()

    def _handle(self, turn: _Turn, events: Sequence[Event]) -> None:
        """With the lock: what each of these events means for its job."""
        handlers, out, ended, now = self._handlers, self._out, turn.ended, turn.now
        # Where all this is so at the beginning, a run that returned ends its job here, and a batch in one loop, as
        # _on_done() would: the calls by which it does take a tenth of the time of a short job.
        unopened = self._unopened
        plain = not (
            self._dooms or self._timed or self._resources or self._notifier.active or self._retries.spent or unopened
        )
        if plain and isinstance(events, DoneBatch):
            self._end_batch(turn, events)
            return
        for event in events:
            job = out.get(event.job_id)
            if job is None or not job.in_backend:
                if type(event) is Released:
                    self._on_released(turn, None, event)  # else it was given up
            elif plain and type(event) is Done:
                job.in_backend = False
                self._in_backend -= 1
                callbacks = job.finish(_DONE, event.output, None, None, event, now)
                if callbacks:
                    turn.callbacks.append((job, callbacks))
                ended.append(job)
            elif event.job_id in unopened and type(event) not in _AT_ONCE:
                self._take_in_later(turn, job, event)
            else:
                handlers[type(event)](turn, job, event)
                plain = plain and not unopened

    def _handle_opened(self, turn: _Turn, event: Event, opened: Event) -> None:
        """With the lock: take in an event that was unpickled, or that had to wait for others which were."""
        job_id = event.job_id
        self._unopened[job_id] -= 1
        if not self._unopened[job_id]:
            del self._unopened[job_id]
        job = self._out.get(job_id)
        if type(event) not in (Done, DonePickled):
            if job is not None and (job.in_backend or job_id in self._returned):
                self._handlers[type(opened)](turn, job, opened)
        elif job_id in self._returned and job is not None:
            self._returned.remove(job_id)
            if isinstance(opened, Failed):
                self._end(turn, job, _FAILED, opened, None, opened.error, opened.cause)
            elif isinstance(opened, Done):
                self._end(turn, job, _DONE, opened, opened.output)

    def _end_batch(self, turn: _Turn, batch: DoneBatch) -> None:
        before = len(turn.ended)
        try:
            jobs = map(self._out.get, map(_id, batch.tasks))  # a backend may have tasks of its own
            Job.finish_many(jobs, batch, turn.now, turn.ended, turn.callbacks)
        finally:
            self._in_backend -= len(turn.ended) - before

    def _conclude(self, turn: _Turn) -> None:
        """With the lock: what has ended is out no longer; have it, and what was touched, recorded and told of, before
        anybody can gather it.
        """
        ended = turn.ended
        out, finished = self._out, self._finished
        for job in ended:
            del out[job.id]
            finished[job.number] = job
        if ended or turn.changed:
            self._recorder.note(turn.changed, ended, bool(self._pending) and not self._backend.runs_in_caller)
        if self._notifier.active:
            self._notifier.post("on_progress", turn.progressed)
            self._notifier.post("on_done", ended)
        if ended:
            for waiter in self._waiters:
                waiter.ended(ended)
            self._release_waiters()

    def _tell(self, turn: _Turn) -> None:
        """Without the lock: call those who wait for the end of one job."""
        for job, callbacks in turn.callbacks:
            for callback in callbacks:
                try:
                    callback(job)
                except Exception:  # noqa: BLE001 - whose callback it is cannot be known
                    _log.exception("a callback of job %s failed", job.id)
        if self._notifier.inline:
            self._notifier.drain()

    def _on_started(self, turn: _Turn, job: Job, event: Started) -> None:
        if job.state is not _RUNNING:
            turn.progressed.append(job)
        job.start(event.time, event.worker)
        turn.changed.append(job)
        if self._timed:
            self._endings.started(job, event.clock)

    def _has_run(self, turn: _Turn, job: Job) -> None:
        """It runs, though nobody has told of its start yet; the times come with that, or with what was measured."""
        job.start(self.epoch + turn.now)
        if self._notifier.active:
            turn.progressed.append(job)

    def _on_progress(self, turn: _Turn, job: Job, event: Progress) -> None:
        if job.state is _QUEUED:
            self._has_run(turn, job)
        job.note_progress(event.progress, event.phase)
        turn.progressed.append(job)

    def _on_recorded(self, turn: _Turn, job: Job, event: Recorded) -> None:
        if job.state is _QUEUED:
            self._has_run(turn, job)
        job.note_record(event.values)
        turn.changed.append(job)

    def _on_printed(self, turn: _Turn, job: Job, event: Printed) -> None:
        job.note_log(event.log)

    def _on_done(self, turn: _Turn, job: Job, event: Done) -> None:
        self._leave_backend(job)
        self._end(turn, job, _DONE, event, event.output)

    def _on_ended(self, turn: _Turn, job: Job, event: Ended) -> None:
        self._endings.ended(job, event.measured)

    def _end_later(self, turn: _Turn, job: Job, event: Done | DonePickled) -> None:
        """Its run is over, and has nothing to do with the backend any more; what it recorded and returned is read in
        peace.
        """
        self._leave_backend(job)
        if event.measured is not None:
            self._endings.arrived(job, event.measured)
            if job.state is _QUEUED:
                job.start(event.measured[0], event.worker)  # over so soon that nobody told of its start
                turn.progressed.append(job)
        self._returned.add(job.id)
        self._open_later(turn, job, event)

    def _take_in_later(self, turn: _Turn, job: Job, event: Event) -> None:
        """The records that the job sent before are still being unpickled, and come first."""
        if isinstance(event, Done):
            self._end_later(turn, job, event)
            return
        if isinstance(event, Failed | Lost):  # the run is over: the time until this is taken in does not count
            self._endings.arrived(job, event.measured if isinstance(event, Failed) else None)
        self._open_later(turn, job, event)

    def _open_later(self, turn: _Turn, job: Job, event: Event) -> None:
        self._unopened[job.id] = self._unopened.get(job.id, 0) + 1
        self._unpickling.put(event)

    def _on_failed(self, turn: _Turn, job: Job, event: Failed) -> None:
        self._leave_backend(job, event.abandoned)
        if job.state is _QUEUED and event.measured is not None:
            job.start(event.measured[0], event.worker)  # over so soon that nobody told of its start
            turn.progressed.append(job)
        self._end(turn, job, _FAILED, event, None, event.error, event.cause)

    def _on_cancelled(self, turn: _Turn, job: Job, event: Cancelled) -> None:
        self._leave_backend(job)
        if job.state is not _CANCELLING and job.id not in self._dooms:
            job.move(_CANCELLING, "interrupted")
        self._end(turn, job, _CANCELLED)

    def _on_lost(self, turn: _Turn, job: Job, event: Lost) -> None:
        self._leave_backend(job)
        error = ErrorInfo("JobLost", event.reason)
        is_wanted = job.state is not _CANCELLING and job.id not in self._dooms
        if not (is_wanted and self._retries.after_loss(job.id)):
            self._end(turn, job, _FAILED, None, None, error, JobCause.LOST)
            return
        # The machine's fault, not the job's: it goes first, and none of its own retries is used up.
        if job.state is _RUNNING:
            self._endings.over(job)
            job.retry(JobCause.LOST, error, None, turn.now)
        if self._closed_because is not None:
            self._cancel_attempt(turn, job)
            return
        turn.changed.append(job)
        self._pending.appendleft(job)

    def _on_rerun(self, turn: _Turn, job: Job, event: Rerun) -> None:
        if job.state is _RUNNING and job.id not in self._dooms:
            self._endings.over(job)
            job.rerun()
            turn.changed.append(job)
            turn.progressed.append(job)

    def _on_released(self, turn: _Turn, job: Job | None, event: Released) -> None:
        if self._resources is not None:
            self._resources.release(event.job_id, event.attempt)

    def _leave_backend(self, job: Job, abandoned: bool = False) -> None:
        job.in_backend = False
        self._in_backend -= 1
        if self._resources is not None:
            self._resources.give_back(job, abandoned)

    def _end(
        self,
        turn: _Turn,
        job: Job,
        state: JobState,
        run: Done | Failed | None = None,
        output: Any = None,
        error: ErrorInfo | None = None,
        cause: JobCause | None = None,
    ) -> None:
        """A run has ended; what that means depends on what was asked of it before, and on the retries that are left."""
        self._returned.discard(job.id)
        if self._dooms or self._timed:
            doom = self._endings.over(job, None if run is None else run.measured)
            if job.state is _CANCELLING:
                state, error, cause = _CANCELLED, None, None
            elif doom is not None:
                state, error, cause = _FAILED, ErrorInfo("JobTimeout", doom), JobCause.TIMEOUT
        if cause is not None and error is not None and self._again(turn, job, cause, error, run):
            return
        if self._notifier.active and run is not None and job.state is _QUEUED:
            turn.progressed.append(job)  # it was over so soon that nobody told of its start
        callbacks = job.finish(state, output, error, cause, run, turn.now)
        if callbacks:
            turn.callbacks.append((job, callbacks))
        if self._retries.spent:
            self._retries.forget(job.id)
        turn.ended.append(job)

    # -- other attempts -------------------------------------------------------------------------------------------

    def _again(self, turn: _Turn, job: Job, cause: JobCause, error: ErrorInfo, run: Done | Failed | None) -> bool:
        """Whether a run that failed is followed by another attempt, which is then under way."""
        if job.state is _QUEUED:
            return False  # it could not even be sent
        delay = self._retries.after(job.id, cause)
        if delay is None:
            return False
        job.retry(cause, error, run, turn.now)
        if self._closed_because is not None:
            self._cancel_attempt(turn, job)
            return True
        turn.changed.append(job)
        if delay:
            self._timers.call_later(delay, self._requeue, job)
        else:
            self._pending.append(job)
        return True

    def _cancel_attempt(self, turn: _Turn, job: Job) -> None:
        """It would be run again, but nothing starts any more."""
        job.move(_CANCELLING, self._closed_because or "")
        self._end(turn, job, _CANCELLED)

    def _requeue(self, job: Job) -> None:
        with self._lock:
            if job.state is _QUEUED:
                self._pending.append(job)
        self.pump()

    # -- endings that are asked for -------------------------------------------------------------------------------

    def _cancel(self, job: Job, reason: str) -> CancelOutcome:
        turn = _Turn(self.clock())
        with self._lock:
            if job.is_complete:
                return CancelOutcome.TOO_LATE
            if job.state is _CANCELLING:
                return CancelOutcome.REQUESTED
            ran, attempt = job.state is _RUNNING, job.attempt
            job.move(_CANCELLING, reason)
            asked = job.id in self._dooms  # it is out of time; from now on it gets no other attempt either
            sent = job.in_backend
            if sent:
                self._dooms[job.id] = reason
                turn.changed.append(job)
            else:
                self._withdrawn = True
                self._end(turn, job, _CANCELLED)
            self._conclude(turn)
        self._tell(turn)
        if sent and not asked:
            self._endings.ask(job, attempt)
        # It may have started, and even ended, between the look at its state and the word to the backend.
        if ran or job.has_started or job.id in self._out:
            return CancelOutcome.REQUESTED
        return CancelOutcome.CANCELLED


class _Turn:
    """What one round of events has changed."""

    __slots__ = ("callbacks", "changed", "ended", "now", "progressed")

    def __init__(self, now: float) -> None:
        self.now = now
        self.changed: list[Job] = []  # but not ended
        self.progressed: list[Job] = []
        self.ended: list[Job] = []
        self.callbacks: list[tuple[Job, list[Callable[[Job], None]]]] = []
