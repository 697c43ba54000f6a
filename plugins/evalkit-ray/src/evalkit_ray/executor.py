"""RayExecutor: an executor of which each call is a task of Ray, or one more for a task that has just done with another.

::

    submit ──▶ task.remote ══▶ Ray's worker (task.py)
      │                            ║      │  ▲
      └───chunk, over a line ──────║──────│──┘
                                   ║      │
    future ◀── our thread ◀────────║──────┘ answer
                   ▲               ▼
                   └─── Ray's thread, which may not be held up
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from functools import partial
from typing import Any

import ray
from ray.exceptions import TaskCancelledError, WorkerCrashedError

from evalkit.backends import Peer, Peers
from evalkit_ray.lines import LONGEST, give, hang_up
from evalkit_ray.task import Delivery, run_chunk

__all__ = ["GONE", "RayExecutor"]

#: Of the error of jobs.
GONE = "Ray was shut down under this evaluator; create another one"
_MISSED = 2.0  # seconds in which a kill that came too late may hit the next task in that worker
_DRAIN = 1.0  # seconds, at most, for the last words of a task that died
_LOOK = 5.0  # seconds between two looks whether Ray is still there: it says nothing when it is shut down


class RayExecutor(Executor):
    """Calls as tasks of Ray. What is called goes into the object store once, and to each worker once.

    A call goes to Ray at once, and from then on it cannot be taken back, but it can be ended (:meth:`kill`). It is a
    task of its own, unless one on this machine has answered within the last milliseconds: then it goes to that one.
    Whatever becomes of the task becomes of the call that is in it.

    Args:
        options: of the tasks, as ``ray.remote`` takes them. Ray never runs one again: that is for evalkit, which knows
            what had ended.
        folder: where to have the socket; None for a temporary folder.
    """

    def __init__(self, options: Mapping[str, Any], folder: str | None = None) -> None:
        _check_connected()
        self._remote = ray.remote(**{**options, "max_retries": 0})(run_chunk)
        self._node = ray.get_runtime_context().get_node_id()
        self._program: _Program | None = None
        self._lock = threading.Lock()
        self._calls: dict[Future[Any], _Call] = {}
        self._numbers = itertools.count(1)
        self._tasks: dict[int, _Task] = {}
        self._idle: dict[_Task, Peer] = {}  # that wait for another call, for a moment
        self._shut = False
        self._over = False
        self._missed = -math.inf  # when a task that was to be killed had ended by itself
        self._ended: deque[tuple[_Task, Future[Any]]] = deque()
        self._lines = Peers(folder)
        self._thread = threading.Thread(target=self._serve, name="evalkit-ray", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call ``fn(chunk)`` in a worker.

        Args:
            fn: takes and returns bytes; mostly the same, the last one is kept in the object store.
            args: the chunk, and nothing else.

        Raises:
            RuntimeError: after a shutdown, of this or of Ray.
        """
        (chunk,) = args
        _check_connected()
        program = self._program
        if program is None or program.function is not fn:
            program = self._program = _Program(fn)
        call = _Call(program, chunk)
        future: Future[Any] = call.future
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._shut:
                raise RuntimeError("cannot submit after shutdown")
            self._calls[future] = call
            try:
                if not self._give(call):
                    self._start(call, delivering=False)
            except BaseException:
                del self._calls[future]
                raise
        return future

    def _give(self, call: _Call) -> bool:
        """With the lock: give it to a task that waits for one; say whether there is one."""
        fits = len(call.chunk) <= LONGEST
        while self._idle:
            task, line = self._idle.popitem()
            if fits and task.program is call.program and give(line, call.chunk):
                task.call, call.task = call, task
                return True
            hang_up(line)  # Ray may need its worker for the call
            if not fits:
                break
        return False

    def _start(self, call: _Call, *, delivering: bool) -> None:
        """With the lock: make it a task."""
        program = call.program
        task = call.task = _Task(next(self._numbers), call)
        ticket = (program.token, task.number, self._node, self._lines.address)
        delivery = [program.reference] if delivering else []
        task.reference = self._remote.remote(ticket, call.chunk, *delivery)
        self._tasks[task.number] = task
        task.reference.future().add_done_callback(partial(self._task_ended, task))

    def _task_ended(self, task: _Task, ended: Future[Any]) -> None:
        """In a thread of Ray."""
        self._ended.append((task, ended))
        self._lines.wake()

    # -- in our thread --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._over:
                heard = self._listen(_LOOK)
                if not heard and not self._ended and not ray.is_initialized():
                    self._fail_all()
                while self._ended:
                    self._conclude(*self._ended.popleft())
        finally:
            with self._lock:
                self._shut = True
            self._lines.close()
            self._fail_all()

    def _listen(self, timeout: float) -> bool:
        """Hear what tasks answer within so many seconds; say whether there was anything."""
        heard = self._lines.turn(timeout)
        for line, answers in heard or ():
            with self._lock:
                task = self._tasks.get(line.number or 0)
                if answers is None:
                    self._lines.drop(line)
                    if task is not None:
                        self._retire(task)
            for answer in answers or ():
                if task is not None:
                    self._answered(task, line, answer)
        return heard is not None

    def _answered(self, task: _Task, line: Peer, answer: bytes) -> None:
        with self._lock:
            task.line = line
            task.answers += 1
            call, task.call = task.call, None
            if call is None:
                return
            if not task.retired:
                self._idle[task] = line
            self._calls.pop(call.future, None)
        call.future.set_result(answer)

    def _retire(self, task: _Task) -> None:
        """With the lock: it takes no more calls."""
        task.retired = True
        self._idle.pop(task, None)

    def _conclude(self, task: _Task, ended: Future[Any]) -> None:
        """A task has ended, and so has the call that is still in it."""
        with self._lock:
            self._retire(task)
        exc = ended.exception()
        if exc is not None:  # what it said last is here, on one machine; others may say something all the time
            until = time.monotonic() + _DRAIN
            while time.monotonic() < until and self._listen(0.0):
                pass
        with self._lock:
            self._tasks.pop(task.number, None)
            if task.line is not None:
                hang_up(task.line)  # a child of its worker may have it open
                self._lines.drop(task.line)
            call, task.call = task.call, None
        if exc is None and task.killed:
            self._missed = time.monotonic()
        if call is None:
            return
        if isinstance(exc, WorkerCrashedError) and time.monotonic() - self._missed < _MISSED:
            self._missed = -math.inf
            exc = TaskCancelledError()  # Ray has killed the wrong one, as it may
        answer: bytes | None = None
        if exc is None:
            report = ended.result()
            if report is None or report[0] == task.answers:
                exc = self._start_again(task, call, delivering=report is None)
                if exc is None:
                    return
            else:
                answer = bytes(report[1])
        with self._lock:
            self._calls.pop(call.future, None)
        if exc is None:
            call.future.set_result(answer)
        else:
            call.future.set_exception(exc)

    def _start_again(self, task: _Task, call: _Call, *, delivering: bool) -> BaseException | None:
        """The worker has yet to be given the program, or the call came too late to it; return why it cannot be."""
        with self._lock:
            if task.killed:
                return TaskCancelledError()
            try:
                _check_connected()
                self._start(call, delivering=delivering)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the call ends with it
                return exc
        return None

    def _fail_all(self) -> None:
        """Nobody will ever tell what has become of these calls."""
        with self._lock:
            left = list(self._calls)
            for call in self._calls.values():
                if call.task is not None:
                    call.task.call = None
            self._calls.clear()
            self._tasks.clear()
        reason = "the executor was shut down" if ray.is_initialized() else GONE
        for future in left:
            future.set_exception(RuntimeError(reason))

    # -- its end --------------------------------------------------------------------------------------------------

    def kill(self, future: Future[Any]) -> bool:
        """End the worker that a call is in, or the call if it waits for one; say whether it was there."""
        with self._lock:
            call = self._calls.get(future)
            if call is None:
                return False
            task = call.task
            if task is not None:
                task.killed = True
                self._retire(task)
                if ray.is_initialized():  # else it ends at the next look
                    ray.cancel(task.reference, force=True)
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no calls any more.

        Args:
            wait: for the calls to end.
            cancel_futures: end them by force.
        """
        self.end(None if wait else 0.0, kill=cancel_futures)

    def end(self, patience: float | None, *, kill: bool) -> None:
        """As :meth:`shutdown`.

        Args:
            patience: seconds to wait for the calls to end; None for as long as they take.
            kill: whether they are ended by force.
        """
        with self._lock:
            self._shut = True
            left = list(self._calls)
        for future in left if kill and ray.is_initialized() else ():
            with contextlib.suppress(Exception):  # Ray may be going away itself
                self.kill(future)
        in_ours = threading.current_thread() is self._thread
        if not in_ours:
            wait(left, patience)
        self._over = True
        self._lines.wake()
        if not in_ours:
            self._thread.join(1.0)


def _check_connected() -> None:
    """Raise ``RuntimeError`` if Ray would have to connect itself, to whatever it finds."""
    if not ray.is_initialized():
        raise RuntimeError(GONE)


class _Program:
    """What is called, in the object store."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.token = uuid.uuid4().hex
        self.reference = ray.put(Delivery(function, [os.path.abspath(folder) for folder in sys.path]))


class _Call:
    __slots__ = ("chunk", "future", "program", "task")

    def __init__(self, program: _Program, chunk: bytes) -> None:
        self.program = program
        self.chunk = chunk
        self.future: Future[Any] = Future()
        self.task: _Task | None = None  # that it is in


class _Task:
    """A task of Ray, and the call that is in it."""

    __slots__ = ("answers", "call", "killed", "line", "number", "program", "reference", "retired")

    def __init__(self, number: int, call: _Call) -> None:
        self.number = number
        self.program = call.program
        self.call: _Call | None = call
        self.line: Peer | None = None
        self.answers = 0  # that came over it
        self.reference: Any = None
        self.retired = False  # it takes no more calls
        self.killed = False
