"""Ctrl-C and SIGTERM: the first ends a run in good order, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

__all__ = ["Interrupts"]

_MESSAGE = b"ended at once; what was stored is stored\n"


class Interrupts:
    """Has SIGTERM do what Ctrl-C does, and remembers which it was.

    Attributes:
        exit_code: 130 after Ctrl-C, 143 after SIGTERM: 128 and the number of the signal.
    """

    def __init__(self) -> None:
        self.exit_code = 128 + signal.SIGINT
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end_at_once_next(self) -> None:
        """From now on a signal ends the process without further ado; its workers end with it."""
        for number in self._before:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end_at_once)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        # Whoever handles Ctrl-C at the moment, such as a backend that runs jobs in this thread, handles this as well.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        raise KeyboardInterrupt


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - as signal calls it
    os.write(2, _MESSAGE)
    os._exit(128 + number)
