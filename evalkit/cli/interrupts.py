"""What ends a run from outside: Ctrl-C, the signals of batch systems, a terminal that is closed.

The first ends it in good order, the second at once. The handlers run wherever the main thread happens to be, perhaps
with a lock held, so they do next to nothing: before anything runs they raise ``KeyboardInterrupt``, later they tell a
thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from evalkit.cli.console import INTERRUPTED, RESUME

__all__ = ["Interrupts"]

_MESSAGE = b"ended at once; what was stored is stored\n"
#: What batch systems send before the end, and what a terminal sends when it is closed.
_SYSTEM = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
#: Seconds in which another signal of the system is the same one: timeout and mpiexec signal a process, then its group.
_SAME = 1.0


class Interrupts:
    """Turns signals into one request to stop.

    Attributes:
        number: of the signal that came first; None as long as there was none.
        stopped: set once what :meth:`calling` calls has returned.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.stopped = threading.Event()
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._deaf = False  # to SIGINT: whoever started this wants it ignored
        self._passed_on = False  # a signal of the system is on its way to who handles Ctrl-C
        self._told: SimpleQueue[bool] | None = None  # its put may be called in a handler, wherever that comes

    @property
    def exit_code(self) -> int:
        """After Ctrl-C 130, as shells have it; after what the system sends, what says that a resume goes on."""
        return INTERRUPTED if self.number in (None, signal.SIGINT) else RESUME

    @property
    def name(self) -> str:
        """What came, in words."""
        return "interrupted" if self.number in (None, signal.SIGINT) else f"ended by {signal.Signals(self.number).name}"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SYSTEM:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                    self._before[number] = signal.signal(number, self._on_system)
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
            self._deaf = self._before[signal.SIGINT] is signal.SIG_IGN
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def calling(self, stop: Callable[[], None]) -> Iterator[None]:
        """From now on the first signal has ``stop()`` called, in a thread, and raises nothing: what is under way ends
        as it does when it is asked to. Only a job that runs in the main thread is ended by ``KeyboardInterrupt``.
        """
        told = self._told = SimpleQueue[bool]()

        def wait() -> None:
            if told.get():
                stop()
                self.stopped.set()

        thread = threading.Thread(target=wait, name="evalkit-interrupts", daemon=True)
        thread.start()
        try:
            if self.number is not None:
                told.put(True)  # it came on the way here
            yield
        finally:
            told.put(False)
            thread.join()

    def _on_system(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._since > _SAME:
                _end_at_once(number)
            return
        self._note(number)
        # Whoever handles Ctrl-C at the moment, a backend that runs a job in this thread, handles this as well.
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and handler != self._on_interrupt:
            self._passed_on = True
            handler(signal.SIGINT, frame)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._passed_on:
            self._passed_on = False
            raise KeyboardInterrupt
        if self._deaf:
            return
        if self.number is not None:
            _end_at_once(number)
        self._note(number)
        if signal.getsignal(signal.SIGINT) != self._on_interrupt:
            raise KeyboardInterrupt

    def _note(self, number: int) -> None:
        self.number = number
        self._since = time.monotonic()
        if self._told is None:
            raise KeyboardInterrupt
        self._told.put(True)


def _end_at_once(number: int) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, _MESSAGE)
    os._exit(128 + number)
