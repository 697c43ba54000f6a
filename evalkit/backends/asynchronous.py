"""AsyncBackend: the door for engines that are spoken to with ``async``, as services and batch systems are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from evalkit.backends.base import Backend, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import (
    Cancelled,
    Done,
    DonePickled,
    Event,
    Failed,
    Lost,
    Measured,
    Pickled,
    Released,
    Started,
    WorkerIdentity,
)
from evalkit.backends.execution import LocalChannel, failed, identity, take_all
from evalkit.errors import BackendError
from evalkit.job import ErrorInfo, JobCause
from evalkit.running import RunningJob, own_copy

__all__ = ["AsyncBackend", "RunFailedError", "RunLostError"]

_log = logging.getLogger("evalkit")

_id = attrgetter("id")
_HOLD = 0.001  # seconds that the end of a job may wait for the ends of others
_BRIEF = 0.0005  # seconds; where jobs take less, their starts may wait as well


class RunFailedError(Exception):
    """Raised by ``execute`` to say how a run failed, where the engine knows more than an exception tells.

    Args:
        cause: such as CRASH, or MEMORY.
        error: its type, message and traceback, and the exit code or the signal.
    """

    def __init__(self, cause: JobCause, error: ErrorInfo) -> None:
        super().__init__(f"{cause}: {error}")
        self.cause = cause
        self.error = error


class RunLostError(Exception):
    """Raised by ``execute`` when a run ended by no fault of the job, as with its machine: it is to run again.

    Args:
        reason: what happened.
    """


class _Run(LocalChannel):
    """One run of a job, and its channel."""

    __slots__ = ("id", "job", "lane", "since", "task", "told", "was_killed", "worker")

    def __init__(self, emit: Emit, job_id: str, lane: asyncio.Task[None], worker: WorkerIdentity) -> None:
        super().__init__(emit)
        self.id = job_id
        self.lane = lane
        self.worker = worker
        # Until it runs, it has none of these; and no job when it is over, which holds this: that would have the two
        # wait for the garbage collector.
        self.task: Task | None = None
        self.job: RunningJob | None = None
        self.since = 0.0  # on the clock of the system
        self.told = False  # whether that was told
        self.was_killed = False


class AsyncBackend(Backend):
    """A backend of which an author writes ``async def execute(self, job)``; all the rest is here.

    ``execute`` runs on one private loop thread, at most ``num_workers`` times at once. Being cancelled
    (``asyncio.CancelledError``) is how a job is killed: let go of what it uses, and raise it on. ``ask_to_stop`` may be
    overridden where the engine can pass a request on, ``open`` and ``shut`` to hold a session; all run on the loop.

    Attributes:
        run_function: the user's function, for a backend that runs it or ships it.
    """

    capabilities = Capabilities(streams=True)
    run_function: RunFunction

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        # What waits, and in which order. Whoever pops a task has it.
        self._waiting: dict[str, Task] = {}
        self._order: deque[str] = deque()
        self._events: deque[Event] = deque()
        self._events_since = 0.0
        self._flush_due = False
        self._running: dict[str, _Run] = {}  # in the order of their starts
        self._leased = False  # whether tasks have resources, all of them or none: asking each takes time
        self._lanes: set[asyncio.Task[None]] = set()
        self._dying: set[asyncio.Task[None]] = set()  # of jobs that were killed, and let go of what they use
        self._stopped = False

    @abstractmethod
    async def execute(self, job: RunningJob) -> Any:
        """Run one job and return its output.

        What it raises makes the job FAILED/EXCEPTION; ``RunFailedError`` says another cause, and ``RunLostError`` that
        it is to run again.
        """

    def ask_to_stop(self, job: RunningJob) -> None:
        """Called on the loop when a running job is asked to stop, where ``job.stopped()`` has become true."""

    def say_where(self, job: RunningJob, host: str, pid: int) -> None:
        """Called by ``execute``: the job runs on this host and in this process; without it, here."""
        run = self._running.get(job.id)
        if run is not None and run.job is job:
            run.worker = WorkerIdentity(host, pid, run.worker.name)

    async def open(self) -> None:
        """Called on the loop before the first job. What it raises is raised by ``Evaluator.create``."""

    async def shut(self) -> None:
        """Called on the loop after the last job."""

    @property
    def capacity(self) -> int:
        # The lanes find the next task without asking the evaluator, and it refills them in bulk.
        return 64 * self.num_workers

    # -- what the evaluator calls ---------------------------------------------------------------------------------

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self.run_function = run_function
        self._emit = emit
        self._worker = identity("async-0")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="evalkit-async", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.open(), self._loop).result()
        except Exception as exc:
            self._end_loop()
            raise BackendError(f"{type(self).__name__} cannot start: {type(exc).__name__}: {exc}") from exc

    def dispatch(self, tasks: Sequence[Task]) -> None:
        self._leased = bool(tasks and tasks[0].resources)
        self._waiting.update(zip(map(_id, tasks), tasks, strict=True))
        self._order.extend(map(_id, tasks))
        self._loop.call_soon_threadsafe(self._fill_lanes)

    def cancel(self, job_id: str, kill: bool) -> None:
        if self._waiting.pop(job_id, None) is not None:
            self._emit([Cancelled(job_id)])
            return
        self._request_stop(self._running.get(job_id))
        if kill:
            self._loop.call_soon_threadsafe(self._kill, job_id)

    def tell(self) -> None:
        self._tell([run for run in list(self._running.values()) if not run.told])

    def stop(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        self._waiting.clear()
        self._order.clear()
        for run in list(self._running.values()):
            self._request_stop(run)
        self._on_loop(self._settle(deadline), grace + 5.0)
        self._on_loop(self.shut(), 5.0)
        self._end_loop()

    def _request_stop(self, run: _Run | None) -> None:
        if run is not None:
            run.request_stop()
            self._loop.call_soon_threadsafe(self._pass_on, run)

    def _on_loop(self, coroutine: Any, timeout: float) -> None:
        """Run a last coroutine; a loop that somebody blocks is left behind."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            future.result(timeout)
        except TimeoutError:
            future.cancel()

    def _end_loop(self) -> None:
        self._stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()

    def _serve(self) -> None:
        """Run the loop until it is told to stop, though a task that exits (``sys.exit()``) breaks out of it."""
        while not self._stopped:
            try:
                self._loop.run_forever()
            except BaseException:  # noqa: BLE001 - the other jobs go on
                _log.exception("a task of a job broke out of the event loop")

    # -- on the loop ----------------------------------------------------------------------------------------------

    def _pass_on(self, run: _Run) -> None:
        """The request to stop, to the engine, if the run has not ended."""
        if run.job is not None and self._running.get(run.id) is run:
            try:
                self.ask_to_stop(run.job)
            except Exception:  # noqa: BLE001 - the job is ended by force then
                _log.exception("job %s could not be asked to stop", run.id)

    async def _settle(self, deadline: float) -> None:
        """Wait for what runs until the deadline, then cancel it."""
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        lanes = list(self._lanes)
        for lane in lanes:
            lane.cancel()
        lanes += self._dying
        if lanes:
            await asyncio.wait(lanes, timeout=3.0)

    def _fill_lanes(self) -> None:
        for _ in range(min(self.num_workers - len(self._lanes), len(self._order))):
            lane = self._loop.create_task(self._lane())
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)

    async def _lane(self) -> None:
        """Run waiting tasks one after the other; as many lanes as workers."""
        me = asyncio.current_task()
        if me is None:
            return
        order, waiting, running = self._order, self._waiting, self._running
        brief = False
        while order:
            job_id = order.popleft()
            # Before its task is taken, so that a cancel finds it in one place or the other.
            running[job_id] = run = _Run(self._say, job_id, me, self._worker)
            task = waiting.pop(job_id, None)
            if task is None:
                del running[job_id]
                continue  # it was cancelled
            run.task = task
            resources = task.resources if self._leased else None
            run.job = job = RunningJob(own_copy(task.args), job_id, task.attempt, run, None, resources)
            run.since = start = time.time()
            began = time.monotonic()
            if not brief:  # it may keep the loop for a while, and its time counts from now
                self._flush()
            elif not self._flush_due:
                self._flush_due = True
                self._loop.call_soon(self._flush)
            try:
                output = await self.execute(job)
                now = start + time.monotonic() - began
                ended = DonePickled if type(output) is Pickled else Done
                end: Event = ended(job_id, output, (start, now, None, None), run.worker)
            except BaseException as exc:  # noqa: BLE001 - a failed job is a result, SystemExit included
                now = start + time.monotonic() - began
                if type(exc) is asyncio.CancelledError and me.cancelling():
                    if not run.was_killed:
                        del running[job_id]  # everything stops
                    return
                end = _failure(job_id, exc, (start, now, None, None), run.worker)
            if run.was_killed:
                return  # it was told of
            del running[job_id]
            run.job = None
            run.close()
            self._note(end, now)
            brief = now - start < _BRIEF

    def _kill(self, job_id: str) -> None:
        """End a run now, whatever its coroutine makes of being cancelled; another lane takes the place of its own."""
        self._flush()  # that it runs, if nobody was told yet
        run = self._running.pop(job_id, None)
        if run is not None:
            run.was_killed = True
            self._lanes.discard(run.lane)
            self._dying.add(run.lane)
            run.lane.add_done_callback(self._dying.discard)
            run.lane.cancel()
            run.close()
            error = ErrorInfo("Cancelled", "its coroutine was cancelled")
            self._note(Failed(job_id, JobCause.LOST, error, abandoned=True))
            task = run.task
            if task is not None and task.resources:
                run.lane.add_done_callback(lambda _: self._note(Released(job_id, task.attempt)))
            self._fill_lanes()

    def _say(self, events: Sequence[Event]) -> None:
        """What a job says is told at once, but after what came before; in a thread of the job, by way of the loop."""
        if threading.get_ident() == self._thread.ident:
            self._events.extend(events)
            self._flush()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the job was given up
                for event in events:
                    self._loop.call_soon_threadsafe(self._note, event)

    def _note(self, event: Event, now: float | None = None) -> None:
        """Tell of it with the others of this turn of the loop, and soon in any case."""
        if now is None:
            now = time.time()
        if not self._events:
            self._events_since = now
            if not self._flush_due:
                self._flush_due = True
                self._loop.call_soon(self._flush)
        self._events.append(event)
        if now - self._events_since > _HOLD:
            self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        begun: list[_Run] = []
        for run in reversed(self._running.values()):
            if run.told:
                break  # so were all before it
            run.told = True
            begun.append(run)
        self._tell(reversed(begun))

    def _tell(self, begun: Iterable[_Run]) -> None:
        # What was taken a moment ago, by the loop while another thread asks, does not run yet.
        events: list[Event] = [Started(run.id, run.since, self._worker) for run in begun if run.since]
        events += take_all(self._events)
        if events:
            self._emit(events)


def _failure(job_id: str, exc: BaseException, measured: Measured, worker: WorkerIdentity) -> Failed | Lost:
    """The event of a run that raised."""
    if isinstance(exc, RunLostError):
        return Lost(job_id, str(exc))
    if isinstance(exc, RunFailedError):
        return Failed(job_id, exc.cause, exc.error, measured, worker)
    return failed(job_id, exc, measured, worker)
