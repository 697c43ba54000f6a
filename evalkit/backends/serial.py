"""The serial backend: one process, one thing at a time; what a debugger and a first try want."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter
from types import FrameType
from typing import Any

from evalkit.backends.asynchronous import AsyncBackend
from evalkit.backends.base import Backend, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import Cancelled, Done, Event, Failed, Started
from evalkit.backends.execution import LocalChannel, check_worker_init, failed, identity, take_all, visible
from evalkit.backends.meter import Meter, event_of
from evalkit.interrupts import InterruptHeard, InterruptHeld
from evalkit.running import RunningJob, is_coroutine_function, own_copy

__all__ = ["SerialBackend"]

_id = attrgetter("id")
_HOLD = 0.002  # seconds after which a step comes back to see what is wanted
_BRIEF = 0.0005  # seconds; where jobs take less, their ends are told together


class SerialBackend(Backend):
    """A plain function runs in the thread that gathers, in order, so a debugger works; a coroutine function runs on one
    private loop thread, ``num_workers`` at a time.

    A plain function cannot be interrupted: that its ``job_timeout`` has passed is noticed when it returns. While it has
    resources, they are in the environment of this process.

    Args:
        num_workers: how many coroutines at once; of plain functions it is always one.
        worker_init: called once before the first job; what it returns is ``job.worker_state``.
    """

    capabilities = Capabilities(same_memory=True, by_value=True, streams=True)

    def __init__(self, num_workers: int, *, worker_init: Callable[[], Any] | None = None) -> None:
        super().__init__(num_workers)
        check_worker_init(worker_init)
        self._worker_init = worker_init
        self._engine: Backend = _Inline(worker_init)

    @property
    def runs_in_caller(self) -> bool:  # type: ignore[override]  # it depends on the function
        return self._engine.runs_in_caller

    @property
    def capacity(self) -> int:
        return self._engine.capacity

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        if is_coroutine_function(run_function):
            self._engine = _Coroutines(self.num_workers, self._worker_init)
        self._engine.start(run_function, emit)

    def dispatch(self, tasks: Sequence[Task]) -> None:
        self._engine.dispatch(tasks)

    def cancel(self, job_id: str, kill: bool) -> None:
        self._engine.cancel(job_id, kill)

    def step(self, limit: int, timeout: float | None) -> bool:
        return self._engine.step(limit, timeout)

    def tell(self) -> None:
        self._engine.tell()

    def stop(self, grace: float) -> None:
        self._engine.stop(grace)


class _Coroutines(AsyncBackend):
    """Coroutine functions, on the loop of :class:`AsyncBackend`."""

    def __init__(self, num_workers: int, worker_init: Callable[[], Any] | None) -> None:
        super().__init__(num_workers)
        self._worker_init = worker_init
        self._state: Any = None

    async def open(self) -> None:
        if self._worker_init is not None:
            self._state = self._worker_init()

    def execute(self, job: RunningJob) -> Any:
        job.worker_state = self._state
        return self.run_function(job)


class _Inline(Backend):
    """Plain functions, in the thread that asks for their results."""

    runs_in_caller = True

    def __init__(self, worker_init: Callable[[], Any] | None) -> None:
        super().__init__(1)
        self._worker_init = worker_init
        self._state: Any = None
        self._unfit: BaseException | None = None
        self._waiting: dict[str, Task] = {}  # whoever pops a task has it
        self._order: deque[str] = deque()
        self._channels: dict[str, LocalChannel] = {}  # of what runs; more than one where a job gathers others
        self._busy = threading.RLock()
        self._events: deque[Event] = deque()  # to be told soon
        self._running: str | None = None  # the job that runs, if nobody was told
        self._brief = False  # whether the last job was, so that the start of the next need not be told beforehand
        self._leased = False  # whether tasks have resources, all of them or none: asking each takes time
        self._meter = Meter()

    @property
    def capacity(self) -> int:
        return 1024

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self._function = run_function
        self._emit = emit
        self._worker = identity("serial-0")
        if self._worker_init is not None:
            try:
                self._state = self._worker_init()
            except Exception as exc:  # noqa: BLE001 - each job fails with it
                self._unfit = exc

    def dispatch(self, tasks: Sequence[Task]) -> None:
        self._leased = bool(tasks and tasks[0].resources)
        self._waiting.update(zip(map(_id, tasks), tasks, strict=True))
        self._order.extend(map(_id, tasks))

    def cancel(self, job_id: str, kill: bool) -> None:
        if self._waiting.pop(job_id, None) is not None:
            self._emit([Cancelled(job_id)])
            return
        channel = self._channels.get(job_id)
        if channel is not None:
            channel.request_stop()

    def step(self, limit: int, timeout: float | None) -> bool:
        if not self._order:
            return False
        if not self._busy.acquire(timeout=_HOLD if timeout is None else min(timeout, _HOLD)):
            # Another thread runs what there is. What it keeps for later may be what this one waits for.
            with InterruptHeld():
                self._tell()
            return True
        try:
            return self._run_some(limit)
        finally:
            self._busy.release()

    def tell(self) -> None:
        running = self._running
        if running is not None:
            self._events.append(Started(running, time.time(), self._worker))
        with InterruptHeld():
            self._tell()

    def _say(self, events: Sequence[Event]) -> None:
        """What a job says, in which Ctrl-C may break."""
        with InterruptHeld():
            self._emit(events)

    def _tell(self) -> None:
        events = take_all(self._events)
        if events:
            self._emit(events)

    def _run_some(self, limit: int) -> bool:
        order, waiting, channels, events = self._order, self._waiting, self._channels, self._events
        function, state, unfit = self._function, self._state, self._unfit
        meter, worker, say, brief, leased = self._meter, self._worker, self._say, self._brief, self._leased
        call = self._call if leased else function
        now = time.time()
        until = now + _HOLD
        ran = 0
        with _Interrupts() as interrupts:
            self._tell()  # a job that gathers others is not brief
            meter.pause()
            while ran < limit and order:
                job_id = order.popleft()
                # Before it is taken, so that a cancel finds it in one place or the other.
                channels[job_id] = channel = LocalChannel(say)
                task = waiting.pop(job_id, None)
                if task is None:
                    del channels[job_id]
                    continue  # it was cancelled
                ran += 1
                if brief:
                    self._running = job_id
                else:  # it may take a while, as the last one did
                    events.append(Started(job_id, time.time(), self._worker))
                    self._tell()
                end: Done | Failed | None = None
                if not interrupts.seen:
                    try:
                        interrupts.in_job = True
                        if unfit is None:
                            resources = task.resources if leased else None
                            job = RunningJob(own_copy(task.args), job_id, task.attempt, channel, state, resources)
                            end = event_of(job_id, meter.run(call, job), worker)
                        else:
                            end = failed(job_id, unfit, None, worker)
                        interrupts.in_job = False
                    except KeyboardInterrupt:  # it came just before the job, or just after it
                        interrupts.in_job = False
                self._running = None
                del channels[job_id]
                channel.close()
                if end is None or interrupts.broke_in:
                    events.append(Cancelled(job_id))
                    self._tell()
                    raise KeyboardInterrupt
                events.append(end)
                measured = end.measured
                if measured is not None:
                    now = measured[1] or now
                    self._brief = brief = now - measured[0] < _BRIEF
                if now > until or interrupts.seen:
                    break
            self._tell()
        if interrupts.seen:
            raise KeyboardInterrupt
        return ran > 0

    def _call(self, job: RunningJob) -> Any:
        """The run function, for jobs that have resources."""
        with visible(job.resources):
            return self._function(job)

    def stop(self, grace: float) -> None:
        self._waiting.clear()
        self._order.clear()


class _Interrupts(InterruptHeard):
    """Tells Ctrl-C from a run function that raises KeyboardInterrupt: the one ends the program, the other the job.

    What handled Ctrl-C before decides whether it ends anything. If so, it breaks into the job, or else waits until what
    has happened is told.

    Attributes:
        seen: whether it came.
        in_job: whether the job may be broken into.
        broke_in: whether it was.
    """

    __slots__ = ("broke_in", "in_job", "seen")

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self.in_job = False
        self.broke_in = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        try:
            self.before(number, frame)
        except KeyboardInterrupt:
            self.seen = True
            if self.in_job:
                self.in_job = False
                self.broke_in = True
                raise
