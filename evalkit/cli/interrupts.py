"""What ends a run from outside: Ctrl-C, the signals of batch systems, a terminal that is closed.

The first ends it in good order, the second at once. A thread reads which signals came, from the pipe into which the
interpreter writes them. It cannot be left to handlers: they run in the main thread alone, which may be waiting while
another thread was the one to be interrupted, and wherever it happens to be, in a destructor perhaps, where an exception
is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from evalkit.cli.console import INTERRUPTED, RESUME

__all__ = ["SYSTEM", "Interrupts"]

#: What batch systems send before the end, and what a terminal sends when it is closed.
SYSTEM = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
_NOTHING_RAN = b"interrupted before anything ran\n"
_AT_ONCE = b"ended at once; what was stored is stored\n"
#: Seconds in which another signal of the system is the same one: timeout and mpiexec signal a process, then its group.
_SAME = 1.0


class Interrupts:
    """Turns signals into one request to stop.

    Attributes:
        number: of the signal that came first; None as long as there was none.
        stopped: set once a signal has come, and what was to be called has returned.
    """

    _present: Interrupts | None = None

    def __init__(self) -> None:
        self.number: int | None = None
        self.stopped = threading.Event()
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._deaf = False  # to SIGINT: whoever started this wants it ignored
        self._lock = threading.Lock()
        self._ends_at_once = True
        self._stop: Callable[[], None] | None = None
        self._passed_on = False  # a signal of the system is on its way to who handles Ctrl-C
        self._wakeup = -1  # what set_wakeup_fd had before
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

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
            read, write = self._pipe = os.pipe()
            os.set_blocking(write, False)
            self._thread = threading.Thread(target=self._read, args=(read,), name="evalkit-interrupts", daemon=True)
            self._thread.start()
            self._wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            self._deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            for number in SYSTEM:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                    self._before[number] = signal.signal(number, self._on_system)
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
            Interrupts._present = self
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Leave signals to others from now on."""
        if self._pipe is not None and self._thread is not None:
            self._restore()
            (read, write), self._pipe = self._pipe, None
            os.close(write)
            self._thread.join()
            os.close(read)

    def note(self) -> None:
        """From now on the first signal ends nothing by itself, but has called what :meth:`call` is given."""
        self._ends_at_once = False

    def call(self, stop: Callable[[], None]) -> None:
        """Have ``stop()`` called once a signal has come, in another thread; if it has come already, now.

        A job that runs in the main thread is ended by ``KeyboardInterrupt`` besides.
        """
        with self._lock:
            self._stop = stop
            if not self.stopped.is_set():
                return
        stop()

    # -- in a thread of its own -------------------------------------------------------------------------------------

    def _read(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                self._came(number)

    def _came(self, number: int) -> None:
        if number not in self._before or (self._deaf and number == signal.SIGINT):
            return
        if self.number is not None:
            if number == signal.SIGINT or time.monotonic() - self._since > _SAME:
                _end(128 + number, _AT_ONCE)
            return
        self.number = number
        self._since = time.monotonic()
        if self._ends_at_once:
            _end(self.exit_code, _NOTHING_RAN)
        threading.Thread(target=self._call, name="evalkit-stop", daemon=True).start()

    def _call(self) -> None:
        """Beside the thread that reads, which a second signal has to find at its place."""
        with self._lock:
            stop = self._stop
            if stop is None:
                self.stopped.set()
                return
        stop()
        self.stopped.set()

    # -- in the main thread: for a backend that runs a job there, and handles Ctrl-C while it does --------------------

    def _on_system(self, number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and handler != self._on_interrupt:
            self._passed_on = True
            handler(signal.SIGINT, frame)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        passed_on, self._passed_on = self._passed_on, False
        if passed_on or (not self._deaf and signal.getsignal(signal.SIGINT) != self._on_interrupt):
            raise KeyboardInterrupt

    # -- what was before --------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
        Interrupts._present = None

    @classmethod
    def after_fork(cls) -> None:
        """A fork, by a job perhaps, is another program: signals to it are no signals to the run."""
        if cls._present is not None:
            cls._present._restore()


os.register_at_fork(after_in_child=Interrupts.after_fork)


def _end(code: int, message: bytes) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, message)
    os._exit(code)
