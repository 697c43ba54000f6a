"""What an executor backend does outside the threads of its engine: mending faults, and stopping as the program ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

from evalkit.backends.chunk_wire import Outcome
from evalkit.backends.executor_call import Call

__all__ = ["Mender", "before_executors_wait"]


class Mender:
    """Handles calls that failed, and those that were not told of in full, in a thread that starts with the first.

    Engines tell of failures with their locks held, and there is waiting to do.

    Args:
        mend: called with a call and the exception that ended it.
        conclude: called with a call and its outcome, ``patience`` seconds after it was put here.
        patience: seconds.
    """

    def __init__(
        self,
        mend: Callable[[Call, BaseException], None],
        conclude: Callable[[Call, Outcome], None],
        patience: float,
    ) -> None:
        self._mend = mend
        self._conclude = conclude
        self._patience = patience
        self._lock = threading.Lock()
        self._queue: SimpleQueue[tuple[Call, BaseException | Outcome] | None] = SimpleQueue()
        self._started = False

    def put(self, call: Call, end: BaseException | Outcome) -> None:
        """Have a call mended after an exception, or concluded with its outcome once that is late; returns at once."""
        self._queue.put((call, end))
        with self._lock:
            if not self._started:
                self._started = True
                threading.Thread(target=self._serve, name="evalkit-mender", daemon=True).start()

    def close(self) -> None:
        """End the thread, after what it was given before."""
        self._queue.put(None)

    def _serve(self) -> None:
        late: deque[tuple[float, Call, Outcome]] = deque()
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, late[0][0] - time.monotonic()) if late else None)
            except Empty:
                self._conclude(*late.popleft()[1:])
                continue
            if item is None:
                return
            call, end = item
            if isinstance(end, BaseException):
                self._mend(call, end)
            else:
                late.append((time.monotonic() + self._patience, call, end))
            del item, call, end  # until the next one comes, this thread keeps no result alive


def before_executors_wait(stop: Callable[[], None]) -> None:
    """Call a method when the program ends, before the executors that are in use by now wait for what runs in them.

    They wait in a function that they register with ``threading`` when they are made, or at their first submit, and of
    these the last that was registered is called first: earlier than anything that ``atexit`` calls. The object of the
    method is not kept alive. In a fork of the program it is not called: what it would end is the parent's.
    """
    reference, pid = weakref.WeakMethod(stop), os.getpid()

    def call() -> None:
        method = reference()
        if method is not None and os.getpid() == pid:
            method()

    with contextlib.suppress(RuntimeError):  # the program is ending
        threading._register_atexit(call)  # type: ignore[attr-defined]
