"""ExecutorBackend: the door for engines that offer a ``concurrent.futures.Executor``."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from functools import lru_cache, partial
from typing import Any

from evalkit.backends.base import Backend, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import Cancelled, Done, Event, Failed, Progress, Recorded, Started
from evalkit.backends.execution import LocalChannel, describe, failed, identity, run
from evalkit.backends.serialization import dumps, explain, loads
from evalkit.errors import BackendError, SerializationError
from evalkit.job import ErrorInfo, JobCause
from evalkit.running import RunningJob, is_coroutine_function, own_copy

__all__ = ["ExecutorBackend"]


class ExecutorBackend(Backend):
    """A backend of which an author writes ``make_executor()``; all the rest is here.

    Functions, arguments and outputs travel as evalkit's own pickles (by value where they cannot be imported), unless
    the workers share this process' memory (``capabilities.same_memory``). An executor cannot end a running job: one
    that is to be killed is abandoned, and keeps its worker until it returns. When an executor breaks
    (``BrokenExecutor``), another is made, and the jobs that were in it run again one at a time, so that the one that
    breaks it is known and the others finish.
    """

    capabilities = Capabilities(by_value=True)

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self._lock = threading.Lock()
        self._waiting: deque[Task] = deque()
        # In order of submission. Whoever takes an entry out tells of the end of that run.
        self._futures: dict[str, tuple[Future[Any], Task]] = {}
        self._started: set[str] = set()
        self._fallen: list[Task] = []  # in the executor when it broke
        self._suspects: deque[Task] = deque()  # to run alone
        self._trial: str | None = None  # the suspect that runs alone now
        self._executor: Executor | None = None
        self._stopping = False

    @abstractmethod
    def make_executor(self) -> Executor:
        """A new executor with ``num_workers`` workers. Called at the start, and again whenever one has broken."""

    @property
    def capacity(self) -> int:
        # One waits behind each that runs, so that no worker waits for the evaluator.
        return 2 * self.num_workers

    # -- what the evaluator calls ---------------------------------------------------------------------------------

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self._emit = emit
        self._unfit: ErrorInfo | None = None
        self._channels: dict[str, LocalChannel] = {}
        self._run: Any = partial(_run_here, run_function)
        if not self.capabilities.same_memory:
            try:
                self._run = partial(_run_there, dumps(run_function, "run_function", function=True)[0])
            except SerializationError as exc:
                self._unfit = describe(exc)
        try:
            self._executor = self.make_executor()
        except Exception as exc:
            raise BackendError(f"{type(self).__name__} cannot start: {type(exc).__name__}: {exc}") from exc

    def dispatch(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            self._waiting.extend(tasks)
        self._send()

    def cancel(self, job_id: str, kill: bool) -> None:
        with self._lock:
            for queue in (self._waiting, self._suspects):
                waits = next((task for task in queue if task.id == job_id), None)
                if waits is not None:
                    queue.remove(waits)
                    break
            else:
                waits = None
            future = self._futures[job_id][0] if job_id in self._futures else None
        if waits is not None or (future is not None and future.cancel() and self._forget(job_id, future)):
            self._emit([Cancelled(job_id)])
        elif future is not None:
            channel = self._channels.get(job_id)
            if channel is not None:
                channel.request_stop()
            if kill and self._forget(job_id, future):
                error = ErrorInfo("Abandoned", "an executor cannot end a running job, so it was abandoned")
                self._emit([Failed(job_id, JobCause.LOST, error)])
        self._send()

    def stop(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        with self._lock:
            self._stopping = True
            self._waiting.clear()
            self._suspects.clear()
            futures = [future for future, _ in self._futures.values()]
            for channel in self._channels.values():
                channel.request_stop()
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                _wait(future, deadline - time.monotonic())
        if self._executor is not None:
            self.shut_executor(self._executor)

    def shut_executor(self, executor: Executor) -> None:
        """Let an executor go without waiting for what still runs in it. Override it where the engine can do more."""
        executor.shutdown(wait=False, cancel_futures=True)

    # -- sending and receiving ------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Submit what may be submitted."""
        while True:
            with self._lock:
                task = self._next()
                if task is None:
                    return
                events: list[Event] = []
                future = self._submit(task, events)
                if future is not None:
                    self._futures[task.id] = (future, task)
                    events += self._newly_started()
            self._emit(events)
            if future is not None:
                future.add_done_callback(partial(self._ended, task))

    def _next(self) -> Task | None:
        """With the lock: the task to submit now, if any."""
        if self._stopping or self._fallen:
            return None
        if self._suspects:
            if self._futures:
                return None
            self._trial = self._suspects[0].id
            return self._suspects.popleft()
        if self._trial is not None or not self._waiting:
            return None
        return self._waiting.popleft()

    def _submit(self, task: Task, events: list[Event]) -> Future[Any] | None:
        """With the lock: hand a task to the executor; None, and an event, if that cannot be."""
        if self._unfit is not None:
            events.append(Failed(task.id, JobCause.EXCEPTION, self._unfit))
            return None
        same_memory = self.capabilities.same_memory
        try:
            args = own_copy(task.args) if same_memory else dumps(task.args, "args", in_band=True)[0]
        except SerializationError as exc:
            events.append(failed(task.id, exc, None, None))
            return None
        function = self._run
        if same_memory:
            self._channels[task.id] = channel = LocalChannel(self._emit)
            function = partial(function, channel)
        for executor in (self._executor, None):
            try:
                return self._executor_or_new(executor).submit(function, task.id, task.attempt, args)
            except RuntimeError as exc:  # it is broken, or was shut down behind our back: once more on a new one
                error = describe(exc)
        events.append(Failed(task.id, JobCause.LOST, error))
        return None

    def _executor_or_new(self, executor: Executor | None) -> Executor:
        if executor is None:
            if self._executor is not None:
                self.shut_executor(self._executor)
            self._executor = executor = self.make_executor()
        return executor

    def _newly_started(self) -> list[Event]:
        """With the lock: an executor does not say what runs, but it takes tasks in order, ``num_workers`` at a time."""
        now = time.time()
        events: list[Event] = []
        for index, job_id in enumerate(self._futures):
            if index >= self.num_workers:
                break
            if job_id not in self._started:
                self._started.add(job_id)
                events.append(Started(job_id, now))
        return events

    def _forget(self, job_id: str, future: Future[Any]) -> bool:
        """Take a run out; say whether it was there, so that the caller is the one to tell of its end."""
        with self._lock:
            entry = self._futures.get(job_id)
            if entry is None or entry[0] is not future:
                return False
            del self._futures[job_id]
            self._started.discard(job_id)
            channel = self._channels.pop(job_id, None)
            if channel is not None:
                channel.close()
            if self._trial == job_id:
                self._trial = None
            return True

    def _ended(self, task: Task, future: Future[Any]) -> None:
        if future.cancelled():
            return  # who cancelled it tells
        if not self._forget(task.id, future):
            return  # it was abandoned
        exc = future.exception()
        events: list[Event] = []
        if isinstance(exc, BrokenExecutor):
            events += self._fall(task, exc)
        elif exc is not None:
            events.append(failed(task.id, exc, None, None))
        else:
            events += _read(task.id, future.result())
        with self._lock:
            events += self._newly_started()
        self._emit(events)
        self._send()

    def _fall(self, task: Task, exc: BaseException) -> list[Event]:
        """The executor broke with this task in it. Once all of them are known, those that may be to blame run alone."""
        with self._lock:
            self._fallen.append(task)
            if self._futures:
                return []
            fallen, self._fallen = self._fallen, []
            self._executor_or_new(None)
            if len(fallen) > 1:
                self._suspects.extend(fallen)
                return []
        # It was alone, so it is the one.
        return [Failed(task.id, JobCause.CRASH, ErrorInfo("WorkerDied", f"the worker it ran in died: {exc}"))]


# -- in the worker ------------------------------------------------------------------------------------------------


class _Collector:
    """The channel of a job that cannot be heard while it runs: what it says comes with its result."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def progress(self, job_id: str, progress: float, phase: str) -> None:
        if self.events and isinstance(self.events[-1], Progress):
            self.events.pop()
        self.events.append(Progress(job_id, progress, phase))

    def record(self, job_id: str, values: dict[str, Any]) -> None:
        self.events.append(Recorded(job_id, values))

    def stop_requested(self, job_id: str) -> bool:
        return False


def _call(function: RunFunction, job: RunningJob) -> Any:
    return asyncio.run(function(job)) if is_coroutine_function(function) else function(job)


def _run_here(
    function: RunFunction, channel: LocalChannel, job_id: str, attempt: int, args: dict[str, Any]
) -> list[Event]:
    job = RunningJob(args, job_id, attempt, channel)
    return [run(partial(_call, function), job, identity(threading.current_thread().name))]


@lru_cache(maxsize=8)
def _function_of(payload: bytes) -> RunFunction:
    function: RunFunction = loads(payload)
    return function


def _run_there(payload: bytes, job_id: str, attempt: int, args: bytes) -> bytes:
    """Run a job in another process; the events come back as a pickle, whatever the output is."""
    collector = _Collector()
    worker = identity("executor")
    try:
        job = RunningJob(loads(args), job_id, attempt, collector)
        end: Done | Failed = run(partial(_call, _function_of(payload)), job, worker)
    except BaseException as exc:  # noqa: BLE001 - the function or the arguments cannot be rebuilt here
        end = failed(job_id, exc, None, worker)
    try:
        return dumps([*collector.events, end], "output", in_band=True)[0]
    except SerializationError as exc:
        output = end.output if isinstance(end, Done) else None
        error = explain(output, "output", exc.__cause__ or exc)
        return dumps([failed(job_id, error, end.measured, worker)], "output", in_band=True)[0]


def _read(job_id: str, result: list[Event] | bytes) -> list[Event]:
    if not isinstance(result, bytes):
        return result
    try:
        events: list[Event] = loads(result)
    except BaseException as exc:  # noqa: BLE001 - a user's __setstate__ may do anything
        exc.add_note("The output of the job could not be rebuilt from what the worker sent.")
        return [failed(job_id, exc, None, None)]
    return events


def _wait(future: Future[Any], timeout: float) -> None:
    try:
        future.exception(max(0.0, timeout))
    except BaseException:  # noqa: BLE001 - only that it ended, or that the time is up, matters
        return
