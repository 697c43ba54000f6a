"""Ctrl-C while something is done that must not be torn."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

try:  # the same without conversion to enums, which takes ten times as long as all the rest
    from _signal import getsignal as get_handler  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:  # another Python
    from signal import getsignal as get_handler
    from signal import signal as set_handler

__all__ = ["SIGINT", "InterruptHeld", "get_handler", "hears_only_interrupts", "set_handler"]

SIGINT = int(signal.SIGINT)
_OTHERS = tuple(int(number) for number in signal.valid_signals() if number != SIGINT)


def hears_only_interrupts() -> bool:
    """Whether no handler of a signal, but that of Ctrl-C, can raise anything in this thread."""
    if threading.current_thread() is not threading.main_thread():
        return True
    return not any(map(callable, map(get_handler, _OTHERS)))


class InterruptHeld:
    """In this block, what Ctrl-C does in Python waits until the end; a second one is heard at once.

    Args:
        hurry: called in another thread when Ctrl-C comes, so that the end comes soon. Given where that may take long:
            then only Python's own handler waits, and one that the user has set goes on as it does.
    """

    __slots__ = ("_before", "_heard", "_hurry")

    def __init__(self, hurry: Callable[[], None] | None = None) -> None:
        self._hurry = hurry
        self._heard = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = get_handler(SIGINT)
            if before is signal.default_int_handler or (callable(before) and self._hurry is None):
                self._before = before
                set_handler(SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            set_handler(SIGINT, self._before)
            if self._heard:
                self._before(SIGINT, None)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            self._before(number, frame)
            return
        self._heard = True
        if self._hurry is not None:
            # The main thread may hold any lock at this moment.
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and starts no thread
                threading.Thread(target=self._hurry, name="evalkit-hurry", daemon=True).start()
