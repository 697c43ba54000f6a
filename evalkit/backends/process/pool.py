"""The process backend: a supervised pool of worker processes.

::

    evaluator ──dispatch──▶ backlog ──give──▶ link ══socket══▶ worker (one at a time, in order)
              ◀───emit──── I/O thread ◀─read─ link ◀══════════ result, progress, record
                              │  ▲
                       signal ▼  │ exited
                            nursery (forks the workers, ends what they leave)

Who dispatches writes to the sockets directly, without waiting; the I/O thread reads, and writes what did not fit. How
many tasks a worker holds ahead adapts to how long they take. What a worker has not started can be taken back at any
instant, so a dead worker costs exactly the job it was on, and an idle one gets what waits behind a long job.

One lock, which a thread may take again, guards it all. Events are emitted with it held, so that they come in order; the
evaluator holds no lock when it calls in here, so nobody waits in a circle.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any

from evalkit.backends.base import Backend, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import (
    Cancelled,
    Done,
    Ended,
    Event,
    Failed,
    Lost,
    Printed,
    Progress,
    Started,
    WorkerIdentity,
)
from evalkit.backends.execution import check_worker_init, describe, failed
from evalkit.backends.lead import Lead
from evalkit.backends.pickled import done, recorded
from evalkit.backends.process.capture import can_capture
from evalkit.backends.process.crew import Crew, describe_death
from evalkit.backends.process.link import WorkerLink
from evalkit.backends.process.memory import parse_bytes
from evalkit.backends.process.setup import Setup, pack_setup
from evalkit.backends.process.spawner import TERM_GRACE
from evalkit.backends.process.wire import Frame, Kind, read_done, read_measured
from evalkit.errors import BackendError, SerializationError
from evalkit.job import ErrorInfo, JobCause
from evalkit.joblog import JobLog

__all__ = ["ProcessBackend"]

_log = logging.getLogger("evalkit")

_AHEAD = 0.010  # seconds of work that a worker may hold ahead
_MAX_DEPTH = 2048  # tasks: enough for the 5 ms that the interpreter may keep the I/O thread waiting
_MAX_AHEAD_BYTES = 16 * 2**20
_SHORT = 0.005  # seconds; who waits for jobs that take longer is not lent to the pool
_QUIET = 0.002  # seconds; what waits longer behind a running job goes to an idle worker
_MAX_START_FAILURES = 3  # in a row
_DONE, _FAILED, _DONE_PICKLED = int(Kind.DONE), int(Kind.FAILED), int(Kind.DONE_PICKLED)
_id = attrgetter("id")


class ProcessBackend(Backend):
    """Jobs in worker processes of this machine.

    Args:
        num_workers: how many processes.
        worker_init: called once in each worker before its first job; what it returns is ``job.worker_state``.
        max_jobs_per_worker: a worker that has run so many jobs is replaced by a new one; None for never.
        start_timeout: seconds that a worker may take to start, with the imports of the run function and
            ``worker_init``.
        job_memory: bytes that a worker may take with all that it started, as an int or as ``"2GB"``, ``"512MiB"``; a
            job that takes more is killed, FAILED/MEMORY. Looked at 20 times a second. What the modules that it imported
            and earlier jobs left in the worker take counts too. None for no limit.
        capture: keep what jobs print, on whatever way, as ``job.log`` (Linux); False lets it go where the output of the
            program goes.

    Raises:
        ValueError, TypeError: an option makes no sense.
    """

    capabilities = Capabilities(kills_running=True, isolates_crashes=True, by_value=True, streams=True)

    def __init__(
        self,
        num_workers: int,
        *,
        worker_init: Callable[[], Any] | None = None,
        max_jobs_per_worker: int | None = None,
        start_timeout: float = 300.0,
        job_memory: int | str | None = None,
        capture: bool = True,
    ) -> None:
        super().__init__(num_workers)
        check_worker_init(worker_init)
        if max_jobs_per_worker is not None and not (type(max_jobs_per_worker) is int and max_jobs_per_worker >= 1):
            raise ValueError(f"max_jobs_per_worker takes an int of at least 1, or None, not {max_jobs_per_worker!r}")
        if not start_timeout > 0:
            raise ValueError(f"start_timeout takes a positive number of seconds, not {start_timeout!r}")
        if not isinstance(capture, bool):
            raise TypeError(f"capture takes True or False, not {capture!r}")
        self._job_memory = None if job_memory is None else parse_bytes("job_memory", job_memory)
        self._capture = capture and can_capture()
        self._worker_init = worker_init
        self._max_jobs = sys.maxsize if max_jobs_per_worker is None else max_jobs_per_worker
        self._start_timeout = start_timeout
        self._lock = threading.RLock()
        self._backlog: dict[str, Task] = {}
        self._depth = 1
        self._mean_duration: float | None = None
        self._start_failures = 0
        self._broken: ErrorInfo | None = None
        self._stopping = False
        self._finished = threading.Event()
        self._lead = Lead()
        self._host = socket.gethostname()

    @property
    def capacity(self) -> int:
        return self.num_workers * (2 * self._depth + 1)

    # -- what the evaluator calls ---------------------------------------------------------------------------------

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self._emit = emit
        try:
            setup = pack_setup(Setup(run_function, self._worker_init, self.job_timeout is not None))
        except SerializationError as exc:
            # The jobs fail with this, one by one; a failed job is a result.
            self._broken = describe(exc)
            setup = []
        self._crew = Crew(self.num_workers, setup, self._start_timeout, self._job_memory, self._capture)
        if self._broken is None:
            self._crew.fill_up()
        self._thread = threading.Thread(target=self._serve, name="evalkit-process-pool", daemon=True)
        self._thread.start()

    def dispatch(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            self._backlog.update(zip(map(_id, tasks), tasks, strict=True))
            self._fill()
            wake = any(link.wants_write or len(link.inflight) > 1 for link in self._crew.links.values())
        if wake:  # there is something to write, or, some time, to steal
            self._crew.wake()

    def cancel(self, job_id: str, kill: bool) -> None:
        with self._lock:
            link = self._link_of(job_id)
            if link is not None and link.inflight[0].id != job_id:
                self._return_to_backlog(link.take_back())
            if self._backlog.pop(job_id, None) is not None:
                self._emit([Cancelled(job_id)])
            elif link is not None and kill:
                self._return_to_backlog(link.take_back())
                self._crew.kill(link, job_id)
            elif link is not None:
                link.send(Kind.STOP, job_id)
            self._fill()
        self._crew.wake()

    def log_of(self, job_id: str) -> JobLog | None:
        with self._lock:
            for link in self._crew.links.values():
                if link.inflight and link.inflight[0].id == job_id:
                    log = link.read_log()
                    # If the worker has gone on to its next job, it has said so before.
                    self._look(link)
                    self._fill()
                    self._crew.wake()
                    return log if link.inflight and link.inflight[0].id == job_id else None
        return None

    def lend(self, done: Callable[[], bool], timeout: float | None) -> None:
        if self._mean_duration is not None and self._mean_duration <= _SHORT and not self._finished.is_set():
            self._lead.lend(self._try_turn, self._crew.wake, done, timeout)

    def stop(self, grace: float) -> None:
        with self._lock:
            self._stopping = True
            self._backlog.clear()
            for link in self._crew.links.values():
                link.take_back()
                if link.identity is None:
                    self._crew.kill(link, None)
                elif link.inflight:
                    link.send(Kind.STOP, link.inflight[0].id)
                else:
                    link.send(Kind.QUIT, None)
        self._crew.wake()
        if not self._finished.wait(grace):
            with self._lock:
                for link in self._crew.links.values():
                    self._crew.kill(link, None)
            self._crew.wake()
            self._finished.wait(TERM_GRACE + 5.0)
        self._finished.set()
        self._crew.wake()
        self._thread.join(10.0)
        with self._lock:  # somebody may be cancelling
            self._crew.close()

    # -- giving out (with the lock held) --------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give waiting tasks to the workers that have room for them, the idlest first."""
        if not self._backlog or self._stopping:
            return
        if self._broken is not None:
            lost, self._backlog = self._backlog, {}
            self._emit([Failed(job_id, JobCause.EXCEPTION, self._broken) for job_id in lost])
            return
        if next(iter(self._backlog.values())).resources:
            self._fill_with_resources()
            return
        depth = self._depth
        # A worker that holds more than half of its share is left alone: tasks go out in batches.
        links = [link for link in self._crew.links.values() if len(link.inflight) <= depth // 2 and link.ready]
        if len(links) > 1:
            links.sort(key=lambda link: len(link.inflight))
        events: list[Event] = []
        for index, link in enumerate(links):
            if not self._backlog:
                break
            held = len(link.inflight)
            if held and link.inflight_bytes > _MAX_AHEAD_BYTES:
                continue
            share = -(-len(self._backlog) // (len(links) - index))
            count = min(depth - held, share, self._max_jobs - link.given)
            if count > 0:
                self._give(link, self._take(count), events)
            if link.given >= self._max_jobs:
                link.retiring = True
        if events:
            self._emit(events)

    def _fill_with_resources(self) -> None:
        """Give tasks to the workers that have their resources, or none yet: a worker keeps to its first.

        What a library has found of a device it does not look for again in the same process, whatever the environment
        says by then. Resources that are free are given out in one order, so there are no more of them in use than
        workers, and each has its worker or finds one.
        """
        events: list[Event] = []
        idle = [link for link in self._crew.links.values() if link.ready and not link.inflight]
        for task in list(self._backlog.values()):
            fitting = [link for link in idle if link.resources == task.resources]
            fitting += [link for link in idle if link.resources is None]
            if not fitting:
                continue
            link = fitting[0]
            idle.remove(link)
            link.bind(task.resources)
            self._give(link, [self._backlog.pop(task.id)], events)
            link.retiring = link.given >= self._max_jobs
        if events:
            self._emit(events)

    def _take(self, count: int) -> list[Task]:
        backlog = self._backlog
        if count >= len(backlog):
            tasks = list(backlog.values())
            backlog.clear()
            return tasks
        ids = list(islice(backlog, count))
        return [backlog.pop(job_id) for job_id in ids]

    def _give(self, link: WorkerLink, tasks: list[Task], events: list[Event]) -> None:
        idle = not link.inflight
        for task, exc in link.give(tasks):
            events.append(failed(task.id, exc, None, None))
        if idle and link.inflight:
            events.append(Started(link.inflight[0].id, time.time(), link.identity))

    def _return_to_backlog(self, tasks: list[Task]) -> None:
        """They were first in line before, so they are again."""
        if tasks:
            self._backlog = {task.id: task for task in tasks} | self._backlog

    def _link_of(self, job_id: str) -> WorkerLink | None:
        for link in self._crew.links.values():
            if any(task.id == job_id for task in link.inflight):
                return link
        return None

    def _adapt(self, durations: list[float]) -> None:
        """How many tasks a worker may hold follows how long they take."""
        latest = sum(durations) / len(durations)
        mean = self._mean_duration
        # As if each of them had moved the mean by a tenth of the difference.
        self._mean_duration = mean = latest if mean is None else latest + (mean - latest) * 0.9 ** len(durations)
        self._depth = min(_MAX_DEPTH, 1 + int(_AHEAD / max(mean, 1e-6)))

    def _someone_is_idle(self) -> bool:
        return not self._backlog and any(not link.inflight and link.ready for link in self._crew.links.values())

    def _look_after_quiet(self) -> None:
        """Get the results that a long job holds up, and for who is idle what waits behind it."""
        now = time.monotonic()
        for link in self._crew.links.values():
            due = self._look_due(link)
            if due is not None and due <= now:
                link.looked_at = now
                self._look(link)
                if link.looked_at is not None and self._someone_is_idle():
                    self._return_to_backlog(link.take_back())

    def _look_due(self, link: WorkerLink) -> float | None:
        """When, on the monotonic clock, to look after a worker of which nothing is heard."""
        if len(link.inflight) < 2 or link.running_since is None:
            return None
        if link.looked_at is None:
            return link.running_since + _QUIET
        return link.looked_at + _QUIET if self._someone_is_idle() else None

    def _look(self, link: WorkerLink) -> None:
        """Take what a worker has said, and what it holds back. No more, since it may never stop talking."""
        self._read(link)
        results = link.read_outbox(last=False)
        if results:
            self._receive(link, results)

    # -- the I/O thread, or one that is lent ---------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._finished.is_set():
            self._lead.take()
            self._try_turn(None)
            self._lead.release()

    def _try_turn(self, timeout: float | None) -> bool:
        """Take a turn, at most that many seconds long; say whether there are more to come."""
        try:
            self._turn(timeout)
        except BaseException as exc:  # noqa: BLE001 - see below
            # A defect of ours. Whoever waits for these jobs must not wait for ever.
            _log.exception("the process pool failed")
            self._finished.set()
            with self._lock:
                self._broken = describe(exc)
                tasks = [task for link in self._crew.links.values() for task in link.inflight]
                tasks += self._backlog.values()
                self._backlog.clear()
                self._emit([Failed(task.id, JobCause.LOST, self._broken) for task in tasks])
        return not self._finished.is_set()

    def _turn(self, timeout: float | None) -> None:
        due = self._time_to_next()
        links, nursery = self._crew.wait(due if timeout is None else timeout if due is None else min(due, timeout))
        with self._lock:
            for link in links:
                self._read(link)
            if nursery:
                self._hear_nursery()
            self._look_after_quiet()
            self._fill()
            self._crew.keep_up()
            if self._stopping and not self._crew.links:
                self._finished.set()

    def _time_to_next(self) -> float | None:
        """Seconds until something has to be done though nothing happens; None if nothing has."""
        with self._lock:
            deadline = self._crew.next_deadline()
            for link in self._crew.links.values():
                due = self._look_due(link)
                if due is not None:
                    deadline = due if deadline is None else min(deadline, due)
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _read(self, link: WorkerLink) -> None:
        try:
            frames = link.read()
        except BlockingIOError:
            return
        except (EOFError, ConnectionResetError):
            self._crew.stop_listening(link)
            return
        except MemoryError:
            link.fault = (
                JobCause.MEMORY,
                ErrorInfo("MemoryError", "the main program has no memory for what it returned"),
            )
            self._give_up(link)
            return
        except OSError:
            if link.number in self._crew.links:
                raise
            return  # it was buried before we came to read
        self._receive(link, frames)

    def _receive(self, link: WorkerLink, frames: list[Frame]) -> None:
        try:
            self._take_in(link, frames)
        except Exception:  # noqa: BLE001 - see below
            # What it sends makes no sense, so it is of no use any more; the job it is on fails with it.
            _log.exception("worker %s sent what cannot be read", link.number)
            self._give_up(link)
            return
        if not link.inflight and (self._stopping or (link.retiring and link.doomed is None)):
            link.send(Kind.QUIT, None)

    def _give_up(self, link: WorkerLink) -> None:
        self._crew.stop_listening(link)
        self._crew.kill(link, None)

    def _take_in(self, link: WorkerLink, frames: list[Frame]) -> None:
        """Tell what these frames say of the worker and its jobs."""
        events: list[Event] = []
        durations: list[float] = []
        try:
            self._read_frames(link, frames, events, durations)
        finally:  # of what comes before a frame that cannot be read, all counts
            if durations:
                self._adapt(durations)
                link.move_on()
                if link.inflight and not any(type(event) is Started for event in events):
                    events.append(Started(link.inflight[0].id, time.time(), link.identity))
            if events:
                self._emit(events)

    def _read_frames(self, link: WorkerLink, frames: list[Frame], events: list[Event], durations: list[float]) -> None:
        worker = link.identity
        for kind, _, payload, buffers in frames:
            if kind in (_DONE, _FAILED):
                job_id = link.finish_first()
                value, measured = payload if type(payload) is tuple else pickle.loads(payload)
                durations.append(measured[1] - measured[0])
                if kind == _DONE:
                    events.append(Done(job_id, value, measured, worker))
                else:
                    events.append(Failed(job_id, JobCause.EXCEPTION, value, measured, worker))
            elif kind == _DONE_PICKLED:
                measured, data, arrays = read_done(payload, buffers)
                durations.append(measured[1] - measured[0])
                events.append(done(link.finish_first(), data, arrays, measured, worker))
            elif kind == Kind.STARTED and link.inflight:
                at, clock = pickle.loads(payload)
                events.append(Started(link.inflight[0].id, at, worker, clock))
            elif kind == Kind.ENDED and link.inflight:
                events.append(Ended(link.inflight[0].id, read_measured(payload)))
            elif kind == Kind.PROGRESS and link.inflight:
                events.append(Progress(link.inflight[0].id, *pickle.loads(payload)))
            elif kind == Kind.RECORD and link.inflight:
                events.append(recorded(link.inflight[0].id, payload, buffers))
            elif kind == Kind.LOG and link.inflight:
                events.append(Printed(link.inflight[0].id, link.take_log(payload)))
            elif kind == Kind.READY:
                self._start_failures = 0
                link.identity = WorkerIdentity(self._host, pickle.loads(payload), f"process-{link.number}")
            elif kind == Kind.UNFIT:
                link.retiring = True  # it ends by itself
                self._note_start_failure(pickle.loads(payload))

    # -- the ends of workers --------------------------------------------------------------------------------------

    def _hear_nursery(self) -> None:
        try:
            for death in self._crew.deaths():
                link = self._crew.links.get(death.number)
                if link is not None:
                    self._bury(link, link.fault or describe_death(link, death, self._job_memory))
            if not self._stopping and self._broken is None:
                self._crew.fill_up()
        except EOFError:
            self._replace_nursery()

    def _bury(self, link: WorkerLink, end: tuple[JobCause, ErrorInfo] | None) -> None:
        """A worker has ended: what it was on has failed (or is lost, without an ``end``), and what it held goes
        elsewhere.
        """
        with contextlib.suppress(EOFError, BlockingIOError, ConnectionResetError):
            while True:
                self._receive(link, link.read())
        self._receive(link, link.read_outbox(last=True))
        self._return_to_backlog(link.take_back())
        events: list[Event] = []
        for index, task in enumerate(link.inflight):
            # Results come in order, so it was on the first; and if it was to die for another job, on that one.
            was_on_it = index == 0 and not link.unreached
            if end is not None and was_on_it and link.doomed in (None, "", task.id):
                log = link.read_log()
                if log is not None and log.size:
                    events.append(Printed(task.id, log))
                events.append(Failed(task.id, *end, None, link.identity))
            else:
                events.append(Lost(task.id, "its worker ended, by no fault of its own"))
        if end is not None and link.identity is None and not link.retiring and not self._stopping:
            self._note_start_failure(end[1])
        self._crew.remove(link)
        if events:
            self._emit(events)

    def _replace_nursery(self) -> None:
        """Somebody killed the nursery, and the kernel the workers with it: by no fault of any job."""
        for link in list(self._crew.links.values()):
            self._crew.kill_group(link)
            self._bury(link, None)
        try:
            self._crew.restart()
            if not self._stopping:
                self._crew.fill_up()
        except BackendError as exc:
            self._broken = describe(exc)

    def _note_start_failure(self, error: ErrorInfo) -> None:
        self._start_failures += 1
        if self._start_failures >= _MAX_START_FAILURES and not any(link.ready for link in self._crew.links.values()):
            self._broken = ErrorInfo(
                error.type, f"no worker can start: {error.message}", error.traceback, error.exit_code, error.signal
            )
