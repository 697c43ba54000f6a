"""What an executor backend does outside the threads of its engine: mending faults, and stopping as the program ends."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

from evalkit.backends.executor_call import Call

__all__ = ["Mender", "before_executors_wait"]


class Mender:
    """Handles calls that failed, one at a time, in a thread that starts with the first.

    Engines tell of failures with their locks held, and there is waiting to do.

    Args:
        mend: called with the call and the exception that ended it.
    """

    def __init__(self, mend: Callable[[Call, BaseException], None]) -> None:
        self._mend = mend
        self._lock = threading.Lock()
        self._queue: SimpleQueue[tuple[Call, BaseException] | None] = SimpleQueue()
        self._started = False

    def put(self, call: Call, exc: BaseException) -> None:
        """Have a call looked at; returns at once."""
        self._queue.put((call, exc))
        with self._lock:
            if not self._started:
                self._started = True
                threading.Thread(target=self._serve, name="evalkit-mender", daemon=True).start()

    def close(self) -> None:
        """End the thread, after what it was given before."""
        self._queue.put(None)

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            self._mend(*item)


def before_executors_wait(stop: Callable[[], None]) -> None:
    """Call a method when the program ends, before the executors that are in use by now wait for what runs in them.

    They wait in a function that they register with ``threading`` when they are made, or at their first submit, and of
    these the last that was registered is called first: earlier than anything that ``atexit`` calls. The object of the
    method is not kept alive.
    """
    reference = weakref.WeakMethod(stop)

    def call() -> None:
        method = reference()
        if method is not None:
            method()

    with contextlib.suppress(RuntimeError):  # the program is ending
        threading._register_atexit(call)  # type: ignore[attr-defined]
