"""Ctrl-C while something is done that must not be torn."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

try:  # the same without conversion to enums, which takes ten times as long as all the rest
    from _signal import getsignal as _get_handler  # type: ignore[import-not-found]
    from _signal import signal as _set_handler
except ImportError:  # another Python
    from signal import getsignal as _get_handler
    from signal import signal as _set_handler

__all__ = ["InterruptHeard", "InterruptHeld", "InterruptSeen", "hears_only_interrupts", "raised_by_handler"]

_SIGINT = int(signal.SIGINT)
_OTHERS = tuple(int(number) for number in signal.valid_signals() if number != _SIGINT)


def hears_only_interrupts() -> bool:
    """Whether no handler of a signal, but that of Ctrl-C, can raise anything in this thread."""
    if threading.current_thread() is not threading.main_thread():
        return True
    return not any(map(callable, map(_get_handler, _OTHERS)))


def raised_by_handler(exc: BaseException) -> bool:
    """Whether an exception comes from the handler of a signal that is written in Python."""
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = filter(callable, map(_get_handler, map(int, signal.valid_signals())))
    codes = {
        getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None) for handler in handlers
    }
    traceback = exc.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


class InterruptHeard:
    """In this block, :meth:`hear` is called for Ctrl-C in place of the handler that Python had for it, if it had one.

    Attributes:
        before: that handler, as long as it is replaced.
    """

    __slots__ = ("before",)

    def __init__(self) -> None:
        self.before: Any = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Called as a handler is."""
        raise NotImplementedError

    def replaces(self, handler: Callable[..., Any]) -> bool:
        """Whether this handler is one to replace."""
        return True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = _get_handler(_SIGINT)
            if callable(before) and self.replaces(before):
                self.before = before
                _set_handler(_SIGINT, self.hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            _set_handler(_SIGINT, self.before)


class InterruptSeen(InterruptHeard):
    """In this block, what Ctrl-C raises can be told from what the code in it raises by itself."""

    __slots__ = ("_raised",)

    def __init__(self) -> None:
        super().__init__()
        self._raised: BaseException | None = None

    def hear(self, number: int, frame: FrameType | None) -> None:
        try:
            self.before(number, frame)
        except BaseException as exc:
            self._raised = exc
            raise

    def raised(self, exc: BaseException) -> bool:
        """Whether Ctrl-C, or another signal, raised this exception."""
        return exc is self._raised or raised_by_handler(exc)


class InterruptHeld(InterruptHeard):
    """In this block, what Ctrl-C does in Python waits until the end; a second one is heard at once.

    Args:
        hurry: called in another thread when Ctrl-C comes, so that the end comes soon. Given where that may take long:
            then only Python's own handler waits, and one that the user has set goes on as it does.
    """

    __slots__ = ("_heard", "_hurry")

    def __init__(self, hurry: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._hurry = hurry
        self._heard = False

    def replaces(self, handler: Callable[..., Any]) -> bool:
        return self._hurry is None or handler is signal.default_int_handler

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._heard:
            self.before(_SIGINT, None)

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            self.before(number, frame)
            return
        self._heard = True
        if self._hurry is not None:
            # The main thread may hold any lock at this moment.
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and starts no thread
                threading.Thread(target=self._hurry, name="evalkit-hurry", daemon=True).start()
