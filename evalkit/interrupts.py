"""Ctrl-C while something is done that must not be torn."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

try:  # the same without conversion to enums, which takes ten times as long as all the rest
    from _signal import getsignal as get_handler  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:  # another Python
    from signal import getsignal as get_handler
    from signal import signal as set_handler

__all__ = ["SIGINT", "InterruptHeld", "get_handler", "set_handler"]

SIGINT = int(signal.SIGINT)


class InterruptHeld:
    """In this block, the ``KeyboardInterrupt`` of a Ctrl-C waits until the end; that of a second one does not.

    Where something else than Python's own handler hears Ctrl-C, that goes on as it does.

    Args:
        hurry: called in another thread when Ctrl-C comes, so that the end comes soon.
    """

    __slots__ = ("_heard", "_holds", "_hurry")

    def __init__(self, hurry: Callable[[], None] | None = None) -> None:
        self._hurry = hurry
        self._heard = False
        self._holds = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._holds = get_handler(SIGINT) is signal.default_int_handler
            if self._holds:
                set_handler(SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._holds:
            set_handler(SIGINT, signal.default_int_handler)
            if self._heard:
                raise KeyboardInterrupt

    @property
    def is_safe(self) -> bool:
        """Whether no Ctrl-C can come in between: it is held, or goes to another thread."""
        return self._holds or threading.current_thread() is not threading.main_thread()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            raise KeyboardInterrupt
        self._heard = True
        if self._hurry is not None:
            # The main thread may hold any lock at this moment.
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and starts no thread
                threading.Thread(target=self._hurry, name="evalkit-hurry", daemon=True).start()
