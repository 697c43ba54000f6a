"""Calls of users' code that may take only so long.

A call that takes longer is left behind in the thread that it runs in. A loop in Python is ended there; code in C goes
on until it returns, and code that never lets go of the interpreter cannot be limited.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["CallTimeoutError", "call_within"]

T = TypeVar("T")

_LATE = 0.1  # seconds by which a wait is too long if the program could not run
_CATCH_UP = 0.25  # seconds that a call then has to come to its end


class CallTimeoutError(Exception):
    """The call was left behind."""


def call_within(seconds: float, function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``, called in a thread that is kept for such calls.

    Raises:
        CallTimeoutError: it takes longer than ``seconds``.
        BaseException: what the function raises; a Ctrl-C while this waits.
    """
    if isinstance(threading.current_thread(), _Helper):
        return function(*args)  # a part of a call that is limited already
    call = _Call(function, args)
    try:
        helper = _idle.pop()
    except IndexError:
        helper = _Helper()
        try:
            helper.start()
        except RuntimeError:  # the system has no thread to give now
            return function(*args)
    helper.calls.put(call)
    if not call.wait(seconds) and call.claim():
        # A loop in Python ends by this; whatever else keeps the thread keeps it.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(helper.ident or 0), ctypes.py_object(SystemExit))
        raise CallTimeoutError
    if call.error is not None:
        raise call.error
    result: T = call.result
    return result


class _Call:
    """A call, and what has come of it. The helper says so, or whoever waits gives it up: who claims it first."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        self._claim = [True]
        self._done = threading.Lock()
        self._done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most so long; say whether it came."""
        begin = time.monotonic()
        if self._done.acquire(timeout=seconds):
            return True
        is_late = time.monotonic() - begin > seconds + _LATE
        return is_late and self._done.acquire(timeout=_CATCH_UP)

    def claim(self) -> bool:
        # No lock: an exception may be raised anywhere in a helper that was given up.
        try:
            return self._claim.pop()
        except IndexError:
            return False

    def run(self) -> bool:
        """Make the call; say whether somebody has waited for its end."""
        try:
            self.result = self._function(*self._args)
        except BaseException as exc:  # noqa: BLE001 - it is raised where the result is wanted
            self.error = exc
        if not self.claim():
            return False
        self._done.release()
        return True


class _Helper(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="evalkit-limited", daemon=True)
        self.calls: SimpleQueue[_Call] = SimpleQueue()

    def run(self) -> None:
        with contextlib.suppress(SystemExit):
            while self.calls.get().run():
                _idle.append(self)


_idle: deque[_Helper] = deque()
os.register_at_fork(after_in_child=_idle.clear)  # a fork has none of these threads
