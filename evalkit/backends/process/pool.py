"""The process backend: a supervised pool of worker processes.

::

    evaluator ──dispatch──▶ backlog ──give──▶ link ══socket══▶ worker (one at a time, in order)
              ◀───emit──── I/O thread ◀─read─ link ◀══════════ result, progress, record
                              │  ▲
                       signal ▼  │ exited
                            nursery (forks the workers, ends what they leave)

Who dispatches writes to the sockets directly, without waiting; the I/O thread reads, and writes what did not fit. How many
tasks a worker holds ahead adapts to how long they take. What a worker has not started can be taken back at any instant, so
a dead worker costs exactly the job it was on, and an idle one gets what waits behind a long job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from evalkit.backends.base import Backend, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import (
    Cancelled,
    Done,
    Event,
    Failed,
    Lost,
    Progress,
    Recorded,
    Started,
    WorkerIdentity,
)
from evalkit.backends.execution import describe, failed
from evalkit.backends.process.link import WorkerLink
from evalkit.backends.process.spawner import Exited, Spawner
from evalkit.backends.process.wire import Frame, Kind
from evalkit.backends.serialization import dumps, loads
from evalkit.errors import BackendError, SerializationError
from evalkit.job import ErrorInfo, JobCause

__all__ = ["ProcessBackend"]

_log = logging.getLogger("evalkit")

_AHEAD = 0.010  # seconds of work that a worker may hold ahead
_MAX_DEPTH = 256  # tasks
_MAX_AHEAD_BYTES = 16 * 2**20
_STEAL_AFTER = 0.002  # seconds; what waits longer behind a running job goes to an idle worker
_TERM_GRACE = 1.0  # seconds between SIGTERM and SIGKILL
_MAX_START_FAILURES = 3  # in a row


class ProcessBackend(Backend):
    """Jobs in worker processes of this machine.

    Args:
        num_workers: how many processes.
        worker_init: called once in each worker before its first job; what it returns is ``job.worker_state``.
        max_jobs_per_worker: a worker that has run so many jobs is replaced by a new one; None for never.
        start_timeout: seconds that a worker may take to start, with the imports of the run function and ``worker_init``.

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
    ) -> None:
        super().__init__(num_workers)
        if worker_init is not None and not callable(worker_init):
            raise TypeError(f"worker_init takes a callable without parameters, not {worker_init!r}")
        if max_jobs_per_worker is not None and not (type(max_jobs_per_worker) is int and max_jobs_per_worker >= 1):
            raise ValueError(f"max_jobs_per_worker takes an int of at least 1, or None, not {max_jobs_per_worker!r}")
        if not start_timeout > 0:
            raise ValueError(f"start_timeout takes a positive number of seconds, not {start_timeout!r}")
        self._worker_init = worker_init
        self._max_jobs = sys.maxsize if max_jobs_per_worker is None else max_jobs_per_worker
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._backlog: dict[str, Task] = {}
        self._links: dict[int, WorkerLink] = {}
        self._next_number = 0
        self._outbox: deque[Event] = deque()
        self._kills: list[tuple[float, int]] = []  # (when to SIGKILL, number)
        self._depth = 1
        self._mean_duration: float | None = None
        self._start_failures = 0
        self._broken: ErrorInfo | None = None
        self._stopping = False
        self._finished = threading.Event()
        self._host = socket.gethostname()

    @property
    def capacity(self) -> int:
        return self.num_workers * (2 * self._depth + 1)

    # -- what the evaluator calls ---------------------------------------------------------------------------------

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self._emit = emit
        self._setup = self._pickle_setup(run_function)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._spawner = Spawner(self.num_workers)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._selector.register(self._spawner, selectors.EVENT_READ)
        if self._broken is None:
            for _ in range(self.num_workers):
                self._add_worker()
        self._thread = threading.Thread(target=self._serve, name="evalkit-process-pool", daemon=True)
        self._thread.start()

    def dispatch(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            for task in tasks:
                self._backlog[task.id] = task
            self._fill()
            wake = self._needs_wake()
        if wake:
            self._wake()

    def cancel(self, job_id: str, kill: bool) -> None:
        events: list[Event] = []
        with self._lock:
            if self._backlog.pop(job_id, None) is not None:
                events.append(Cancelled(job_id))
            elif (link := self._link_of(job_id)) is not None:
                if link.inflight[0].id != job_id:
                    self._return_to_backlog(link.take_back())
                if self._backlog.pop(job_id, None) is not None:
                    events.append(Cancelled(job_id))
                elif kill:
                    self._return_to_backlog(link.take_back())
                    self._kill(link, job_id)
                else:
                    link.send(Kind.STOP, job_id)
            self._fill()
        if events:
            self._emit(events)
        self._wake()

    def stop(self, grace: float) -> None:
        with self._lock:
            self._stopping = True
            self._backlog.clear()
            for link in self._links.values():
                link.take_back()
                if link.identity is None:
                    self._kill(link, None)
                elif link.inflight:
                    link.send(Kind.STOP, link.inflight[0].id)
                else:
                    link.send(Kind.QUIT, None)
        self._wake()
        if not self._finished.wait(grace):
            with self._lock:
                for link in self._links.values():
                    self._kill(link, None)
            self._wake()
            self._finished.wait(_TERM_GRACE + 5.0)
        self._finished.set()
        self._wake()
        self._thread.join(10.0)
        self._spawner.close()
        self._selector.close()
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._wake_read.close()
        self._wake_write.close()

    # -- giving out (all with the lock held) ----------------------------------------------------------------------

    def _fill(self) -> None:
        """Give waiting tasks to the workers that have room for them, the idlest first."""
        if not self._backlog or self._stopping:
            return
        if self._broken is not None:
            self._outbox.extend(Failed(job_id, JobCause.EXCEPTION, self._broken) for job_id in self._backlog)
            self._backlog.clear()
            return
        depth = self._depth
        # A worker that holds more than half of its share is left alone: tasks go out in batches.
        links = [link for link in self._links.values() if len(link.inflight) <= depth // 2 and link.ready]
        if len(links) > 1:
            links.sort(key=lambda link: len(link.inflight))
        for index, link in enumerate(links):
            if not self._backlog:
                return
            held = len(link.inflight)
            if held and link.inflight_bytes > _MAX_AHEAD_BYTES:
                continue
            share = -(-len(self._backlog) // (len(links) - index))
            count = min(depth - held, share, self._max_jobs - link.given)
            if count > 0:
                self._give(link, count)
            if link.given >= self._max_jobs:
                link.retiring = True

    def _give(self, link: WorkerLink, count: int) -> None:
        backlog = self._backlog
        if count >= len(backlog):
            tasks = list(backlog.values())
            backlog.clear()
        else:
            ids = [job_id for job_id, _ in zip(backlog, range(count), strict=False)]
            tasks = [backlog.pop(job_id) for job_id in ids]
        idle = not link.inflight
        for task, exc in link.give(tasks):
            self._outbox.append(failed(task.id, exc, None, None))
        if idle and link.inflight:
            self._outbox.append(Started(link.inflight[0].id, time.time(), link.identity))

    def _return_to_backlog(self, tasks: list[Task]) -> None:
        """They were first in line before, so they are again."""
        if tasks:
            self._backlog = {task.id: task for task in tasks} | self._backlog

    def _link_of(self, job_id: str) -> WorkerLink | None:
        for link in self._links.values():
            if any(task.id == job_id for task in link.inflight):
                return link
        return None

    def _needs_wake(self) -> bool:
        return bool(self._outbox) or any(link.wants_write for link in self._links.values())

    def _kill(self, link: WorkerLink, job_id: str | None) -> None:
        if link.doomed is None:
            link.doomed = job_id or ""
            self._spawner.signal(link.number, signal.SIGTERM)
            self._kills.append((time.monotonic() + _TERM_GRACE, link.number))

    # -- workers --------------------------------------------------------------------------------------------------

    def _pickle_setup(self, run_function: RunFunction) -> bytes:
        setup: dict[str, Any] = {"sys_path": list(sys.path), "sys_argv": list(sys.argv)}
        for name, value in (("function", run_function), ("worker_init", self._worker_init)):
            try:
                setup[name] = dumps(value, "run_function" if name == "function" else name, function=True)[0]
            except SerializationError as exc:
                # The jobs fail with this, one by one; a failed job is a result.
                self._broken = describe(exc)
        return pickle.dumps(setup, 5)

    def _add_worker(self) -> None:
        link = WorkerLink(self._next_number)
        self._next_number += 1
        self._links[link.number] = link
        self._selector.register(link.sock, selectors.EVENT_READ, link)
        self._spawner.spawn(link.number, link.fds_for_worker)
        link.close_theirs()
        link.send_raw(Kind.SETUP, self._setup)

    def _remove_worker(self, link: WorkerLink) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(link.sock)
        del self._links[link.number]
        link.close()

    def _bury(self, number: int, status: int) -> list[Event]:
        """A worker has ended: what it was on has crashed, what it held goes elsewhere, and another takes its place."""
        link = self._links.get(number)
        if link is None:
            return []
        events: list[Event] = []
        with contextlib.suppress(EOFError, BlockingIOError, ConnectionResetError):
            while True:
                events.extend(self._receive(link, link.read()))
        with self._lock:
            self._return_to_backlog(link.take_back())
            error = _death(link, status)
            for task in link.inflight:
                if link.doomed is not None and link.doomed not in ("", task.id):
                    events.append(Lost(task.id, "its worker was ended because of another job"))
                else:
                    events.append(Failed(task.id, JobCause.CRASH, error, None, link.identity))
            self._remove_worker(link)
            if link.identity is None and not link.retiring and not self._stopping:
                self._note_start_failure(error)
            if not self._stopping and self._broken is None:
                self._add_worker()
            self._fill()
        return events

    def _note_start_failure(self, error: ErrorInfo) -> None:
        self._start_failures += 1
        if self._start_failures >= _MAX_START_FAILURES and not any(link.ready for link in self._links.values()):
            self._broken = ErrorInfo(
                error.type, f"no worker can start: {error.message}", error.traceback, error.exit_code, error.signal
            )

    # -- the I/O thread -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._finished.is_set():
                self._turn()
        except BaseException as exc:
            # A defect of ours. Whoever waits for these jobs must not wait for ever.
            _log.exception("the process pool failed")
            self._finished.set()
            with self._lock:
                self._broken = describe(exc)
                tasks = [task for link in self._links.values() for task in link.inflight] + list(self._backlog.values())
            self._emit([Failed(task.id, JobCause.LOST, self._broken) for task in tasks])

    def _turn(self) -> None:
        events: list[Event] = []
        for key, mask in self._selector.select(self._next_deadline()):
            if isinstance(key.data, WorkerLink):
                # It may have been buried in this very round.
                if mask & selectors.EVENT_READ and key.data.number in self._links:
                    events.extend(self._read(key.data))
            elif key.fileobj is self._spawner:
                events.extend(self._hear_spawner())
            else:
                with contextlib.suppress(BlockingIOError):
                    while self._wake_read.recv(4096):
                        pass
        with self._lock:
            self._keep_up()
            while self._outbox:
                events.append(self._outbox.popleft())
            if self._stopping and not self._links:
                self._finished.set()
        if events:
            self._emit(events)

    def _next_deadline(self) -> float | None:
        """Seconds until something has to be done though nothing happens; None if nothing has."""
        with self._lock:
            now = time.monotonic()
            deadlines = [when for when, _ in self._kills]
            deadlines += [link.born + self._start_timeout for link in self._links.values() if link.identity is None]
            if self._someone_is_idle():
                deadlines += [
                    link.running_since + _STEAL_AFTER
                    for link in self._links.values()
                    if len(link.inflight) > 1 and link.running_since is not None
                ]
            return max(0.0, min(deadlines) - now) if deadlines else None

    def _someone_is_idle(self) -> bool:
        return not self._backlog and any(not link.inflight and link.ready for link in self._links.values())

    def _keep_up(self) -> None:
        """With the lock: what is due by the clock, and what the sockets had no room for."""
        now = time.monotonic()
        if self._kills:
            for _, number in [kill for kill in self._kills if kill[0] <= now]:
                self._spawner.signal(number, signal.SIGKILL)
            self._kills = [kill for kill in self._kills if kill[0] > now]
        for link in self._links.values():
            if link.identity is None and now - link.born > self._start_timeout and link.doomed is None:
                self._kill(link, None)
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_write else 0)
            if mask & selectors.EVENT_WRITE:
                link.flush()
            with contextlib.suppress(KeyError):
                if self._selector.get_key(link.sock).events != mask:
                    self._selector.modify(link.sock, mask, link)
        if self._someone_is_idle():
            self._steal(now)
        if self._backlog:
            self._fill()

    def _steal(self, now: float) -> None:
        """Take what waits behind the longest-running job, for who is idle."""
        held_up = [
            link
            for link in self._links.values()
            if len(link.inflight) > 1 and link.running_since is not None and now - link.running_since >= _STEAL_AFTER
        ]
        for link in held_up:
            self._return_to_backlog(link.take_back())

    def _hear_spawner(self) -> list[Event]:
        events: list[Event] = []
        try:
            for event in self._spawner.events():
                if isinstance(event, Exited):
                    events.extend(self._bury(*event))
        except EOFError:
            events.extend(self._replace_nursery())
        return events

    def _replace_nursery(self) -> list[Event]:
        """Somebody killed the nursery, and the kernel the workers with it: by no fault of any job."""
        events: list[Event] = []
        with self._lock:
            self._selector.unregister(self._spawner)
            self._spawner.close()
            for link in list(self._links.values()):
                with contextlib.suppress(EOFError, BlockingIOError, ConnectionResetError):
                    while True:
                        events.extend(self._outcomes(link, link.read()))
                self._return_to_backlog(link.take_back())
                events.extend(Lost(task.id, "the parent of the workers was killed") for task in link.inflight)
                self._remove_worker(link)
            if self._stopping:
                return events
            try:
                self._spawner = Spawner(self.num_workers)
            except BackendError as exc:
                self._broken = describe(exc)
                self._fill()
                return events
            self._selector.register(self._spawner, selectors.EVENT_READ)
            for _ in range(self.num_workers):
                self._add_worker()
        return events

    def _read(self, link: WorkerLink) -> list[Event]:
        try:
            frames = link.read()
        except BlockingIOError:
            return []
        except (EOFError, ConnectionResetError):
            # The worker is ending; the nursery will say how.
            self._selector.unregister(link.sock)
            return []
        return self._receive(link, frames)

    def _receive(self, link: WorkerLink, frames: list[Frame]) -> list[Event]:
        with self._lock:
            events = self._outcomes(link, frames)
            if self._stopping and not link.inflight:
                link.send(Kind.QUIT, None)
            elif link.retiring and not link.inflight and link.doomed is None:
                link.send(Kind.QUIT, None)
            elif self._backlog:
                self._fill()
        return events

    def _outcomes(self, link: WorkerLink, frames: list[Frame]) -> list[Event]:
        """With the lock: what these frames say of the jobs of this worker."""
        events: list[Event] = []
        worker = link.identity
        ended = False
        durations: list[float] = []
        for kind, _, payload, buffers in frames:
            if kind == Kind.DONE:
                job_id = link.finish_first().id
                try:
                    output, measured = loads(payload, buffers)
                except BaseException as exc:  # noqa: BLE001 - a user's __setstate__ may do anything
                    exc.add_note("The output of the job could not be rebuilt from what the worker sent.")
                    events.append(failed(job_id, exc, None, worker))
                else:
                    events.append(Done(job_id, output, measured, worker))
                    durations.append(measured[1] - measured[0])
            elif kind == Kind.FAILED:
                error, measured = pickle.loads(payload)
                events.append(Failed(link.finish_first().id, JobCause.EXCEPTION, error, measured, worker))
                durations.append(measured[1] - measured[0])
            elif kind == Kind.PROGRESS and link.inflight:
                events.append(Progress(link.inflight[0].id, *pickle.loads(payload)))
                continue
            elif kind == Kind.RECORD and link.inflight:
                events.append(Recorded(link.inflight[0].id, loads(payload, buffers)))
                continue
            elif kind == Kind.READY:
                self._start_failures = 0
                link.identity = WorkerIdentity(self._host, pickle.loads(payload), f"process-{link.number}")
                continue
            elif kind == Kind.UNFIT:
                link.retiring = True  # it ends by itself
                self._note_start_failure(pickle.loads(payload))
                self._fill()
                continue
            ended = True
        if durations:
            self._adapt(durations)
        if ended and link.inflight:
            events.append(Started(link.inflight[0].id, time.time(), worker))
        return events

    def _adapt(self, durations: list[float]) -> None:
        """How many tasks a worker may hold follows how long they take."""
        latest = sum(durations) / len(durations)
        mean = self._mean_duration
        # As if each of them had moved the mean by a tenth of the difference.
        self._mean_duration = mean = latest if mean is None else latest + (mean - latest) * 0.9 ** len(durations)
        self._depth = min(_MAX_DEPTH, 1 + int(_AHEAD / max(mean, 1e-6)))

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_write.send(b"\0")


def _death(link: WorkerLink, status: int) -> ErrorInfo:
    """How a worker ended, from its wait status."""
    who = f"worker process {link.identity.pid}" if link.identity is not None else "a worker process that was starting"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        return ErrorInfo("WorkerDied", f"{who} was killed by {name}", signal=name)
    code = os.waitstatus_to_exitcode(status)
    return ErrorInfo("WorkerDied", f"{who} exited with code {code}", exit_code=code)
