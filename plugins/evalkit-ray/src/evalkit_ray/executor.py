"""RayExecutor: an executor of which each call is a task of Ray.

::

    submit ──▶ task.remote ══▶ Ray's worker (task.py)
                                   │
    future ◀── our thread ◀── Ray's thread, which may not be held up
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import TaskCancelledError

from evalkit_ray.task import Delivery, run_chunk

__all__ = ["RayExecutor"]

_GONE = "Ray was shut down under this evaluator; create another one"
_LOOK = 5.0  # seconds between two looks whether Ray is still there: it says nothing when it is shut down


class RayExecutor(Executor):
    """Calls as tasks of Ray. What is called goes into the object store once, and to each worker once.

    A call goes to Ray at once, and from then on it cannot be taken back, but it can be ended (:meth:`kill`).

    Args:
        options: of the tasks, as ``ray.remote`` takes them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._task = ray.remote(**options)(run_chunk)
        self._program: _Program | None = None
        self._lock = threading.Lock()
        self._calls: dict[Future[Any], _Call] = {}
        self._shut = False
        self._ended: SimpleQueue[tuple[_Call, Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="evalkit-ray", daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call ``fn(chunk)`` in a worker.

        Args:
            fn: mostly the same; the last one is kept in the object store.
            args: the chunk, and nothing else.

        Raises:
            RuntimeError: after a shutdown, of this or of Ray.
        """
        (chunk,) = args
        _check_connected()
        if self._program is None or self._program.function is not fn:
            self._program = _Program(fn)
        call = _Call(self._program, chunk)
        future: Future[Any] = call.future
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._shut:
                raise RuntimeError("cannot submit after shutdown")
            self._calls[future] = call
            try:
                self._send(call, delivering=False)
            except BaseException:
                del self._calls[future]
                raise
        return future

    def _send(self, call: _Call, *, delivering: bool) -> None:
        """With the lock: make it a task."""
        program = call.program
        if delivering:
            call.reference = self._task.remote(program.token, call.chunk, program.reference)
        else:
            call.reference = self._task.remote(program.token, call.chunk)
        call.reference.future().add_done_callback(partial(self._task_ended, call))

    def _task_ended(self, call: _Call, ended: Future[Any]) -> None:
        self._ended.put((call, ended))

    def _serve(self) -> None:
        while True:
            try:
                item = self._ended.get(timeout=_LOOK)
            except Empty:
                if not ray.is_initialized():
                    self._fail_all()
                continue
            if item is None:
                return
            call, ended = item
            exc = ended.exception()
            if exc is None and ended.result() is None:
                exc = self._send_again(call)
                if exc is None:
                    continue
            with self._lock:
                self._calls.pop(call.future, None)
            if exc is None:
                call.future.set_result(ended.result())
            else:
                call.future.set_exception(exc)
            # Until the next one comes, this thread keeps no result alive.
            del item, call, ended, exc

    def _fail_all(self) -> None:
        """Nobody will ever tell what has become of these calls."""
        with self._lock:
            left = list(self._calls)
            self._calls.clear()
        for future in left:
            future.set_exception(RuntimeError(_GONE))

    def _send_again(self, call: _Call) -> BaseException | None:
        """The worker has yet to be given the program; return why it cannot be."""
        with self._lock:
            if call.killed:
                return TaskCancelledError()
            try:
                _check_connected()
                self._send(call, delivering=True)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the call ends with it
                return exc
        return None

    def kill(self, future: Future[Any]) -> bool:
        """End the worker that a call is in, or the call if it waits for one; say whether it was there."""
        with self._lock:
            call = self._calls.get(future)
            if call is None:
                return False
            call.killed = True
            if ray.is_initialized():  # else it ends at the next look
                ray.cancel(call.reference, force=True)
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
        if threading.current_thread() is not self._thread:
            wait(left, patience)
            self._ended.put(None)
            self._thread.join(1.0)


def _check_connected() -> None:
    """Raise ``RuntimeError`` if Ray would have to connect itself, to whatever it finds."""
    if not ray.is_initialized():
        raise RuntimeError(_GONE)


class _Program:
    """What is called, in the object store."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.token = uuid.uuid4().hex
        self.reference = ray.put(Delivery(function, [os.path.abspath(folder) for folder in sys.path]))


class _Call:
    __slots__ = ("chunk", "future", "killed", "program", "reference")

    def __init__(self, program: _Program, chunk: Any) -> None:
        self.program = program
        self.chunk = chunk
        self.future: Future[Any] = Future()
        self.reference: Any = None
        self.killed = False
