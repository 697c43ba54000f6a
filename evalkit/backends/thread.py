"""The thread backend: jobs in threads of this process."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from evalkit.backends.base import Backend, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import Cancelled, Done, Event, Failed, Released, Started
from evalkit.backends.execution import LocalChannel, check_worker_init, failed, identity
from evalkit.backends.meter import Meter, event_of
from evalkit.job import ErrorInfo, JobCause
from evalkit.running import RunningJob, is_coroutine_function, own_copy

__all__ = ["ThreadBackend"]

_log = logging.getLogger("evalkit")


class ThreadBackend(Backend):
    """Jobs in threads of this process.

    Python cannot end a thread. A job that is to be killed is abandoned: it counts as ended, another thread takes its
    place, and what it still does is ignored.

    Args:
        num_workers: how many threads.
        worker_init: called once in each thread before its first job; what it returns is ``job.worker_state``.
    """

    capabilities = Capabilities(same_memory=True, by_value=True, streams=True)

    def __init__(self, num_workers: int, *, worker_init: Callable[[], Any] | None = None) -> None:
        super().__init__(num_workers)
        check_worker_init(worker_init)
        self._worker_init = worker_init
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        # Whoever pops a task out of here has it: a thread that runs it, or a cancel.
        self._waiting: dict[str, Task] = {}
        # Likewise: whoever pops a run tells of its end, the thread or the one who abandons it.
        self._runs: dict[str, _Run] = {}
        self._threads: set[threading.Thread] = set()  # that were not abandoned
        self._abandoned: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)  # a thread has left
        self._started = 0
        self._stopping = False
        self._warned = False

    @property
    def capacity(self) -> int:
        return 2 * self.num_workers

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self._function = run_function
        self._is_async = is_coroutine_function(run_function)
        self._emit = emit
        for _ in range(self.num_workers):
            self._add_thread()

    def _add_thread(self) -> None:
        name = f"thread-{self._started}"
        self._started += 1
        thread = threading.Thread(target=self._serve, args=(name,), name=f"evalkit-{name}", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _leave(self, thread: threading.Thread) -> None:
        with self._left:
            self._threads.discard(thread)
            self._left.notify_all()

    def dispatch(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._waiting[task.id] = task
            self._queue.put(task.id)

    def cancel(self, job_id: str, kill: bool) -> None:
        if self._waiting.pop(job_id, None) is not None:
            self._emit([Cancelled(job_id)])
        elif kill:
            given_up = self._runs.pop(job_id, None)
            if given_up is not None:
                given_up.close()
                self._abandon(job_id, given_up.thread)
        else:
            asked = self._runs.get(job_id)
            if asked is not None:
                asked.request_stop()

    def _abandon(self, job_id: str, thread: threading.Thread) -> None:
        self._abandoned.add(thread)
        self._leave(thread)
        with self._lock:
            if not self._stopping:
                self._add_thread()
            warn, self._warned = not self._warned, True
        error = ErrorInfo("Abandoned", "the thread it runs in was abandoned")
        self._emit([Failed(job_id, JobCause.LOST, error, abandoned=True)])
        if warn:
            text = (
                f"job {job_id} did not stop when asked; a thread cannot be killed, so it was abandoned and may go on "
                "in the background. method='process' ends such jobs for real."
            )
            try:
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            except RuntimeWarning:  # warnings are errors here, and nobody is there to catch this one
                _log.warning("%s", text)

    def stop(self, grace: float) -> None:
        self._waiting.clear()
        for one in list(self._runs.values()):
            one.request_stop()
        with self._left:
            self._stopping = True
            threads = self._threads - {threading.current_thread()}
            for _ in self._threads:
                self._queue.put(None)
            self._left.wait_for(lambda: not self._threads & threads, grace)
            gone = threads - self._threads - set(self._abandoned)
        for thread in gone:
            thread.join(0.1)  # its last lines
        self._runs.clear()

    def _serve(self, name: str) -> None:
        worker, meter = identity(name), Meter()
        state: Any = None
        unfit: BaseException | None = None
        runner: asyncio.Runner | None = None
        if self._worker_init is not None:
            try:
                state = self._worker_init()
            except BaseException as exc:  # noqa: BLE001 - each job that this thread takes fails with it
                unfit = exc
        function = self._function
        if self._is_async:
            coroutine_function = function

            def function(job: RunningJob) -> Any:
                nonlocal runner
                if runner is None:
                    runner = asyncio.Runner()
                try:
                    return runner.run(coroutine_function(job))
                except (SystemExit, KeyboardInterrupt):
                    # One of its tasks broke out of the loop; what it left there must not go on under the next job.
                    broken, runner = runner, None
                    broken.close()
                    raise

        events: list[Event] = []
        try:
            while True:
                try:
                    job_id = self._queue.get(block=not events)
                except Empty:
                    self._emit(events)
                    events = []
                    continue
                if job_id is None:
                    return
                if job_id not in self._waiting:
                    continue  # it was cancelled
                # Before it is taken, so that a cancel finds it in one place or the other.
                self._runs[job_id] = channel = _Run(self._emit)
                task = self._waiting.pop(job_id, None)
                if task is None:
                    self._runs.pop(job_id, None)
                    continue  # it was cancelled just now
                events.append(Started(job_id, time.time(), worker))
                self._emit(events)
                events = []
                if unfit is None:
                    job = RunningJob(own_copy(task.args), job_id, task.attempt, channel, state, task.resources)
                    end: Done | Failed = event_of(job_id, meter.run(function, job), worker)
                else:
                    end = failed(job_id, unfit, None, worker)
                if self._runs.get(job_id) is not channel or self._runs.pop(job_id, None) is not channel:
                    if task.resources:
                        events.append(Released(job_id, task.attempt))
                    return  # abandoned, and another thread has taken this one's place
                channel.close()
                events.append(end)
        finally:
            if events:
                self._emit(events)
            if runner is not None:
                runner.close()
            self._leave(threading.current_thread())


class _Run(LocalChannel):
    """The channel of a run, and the thread it is in."""

    __slots__ = ("thread",)

    def __init__(self, emit: Emit) -> None:
        super().__init__(emit)
        self.thread = threading.current_thread()
