"""Notifier: calls the callbacks, one at a time, in the order of events."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

from evalkit.callbacks.base import Callback
from evalkit.engine.waiting import LOOK_UP

__all__ = ["Notifier"]

_log = logging.getLogger("evalkit")


class Notifier:
    """Calls callbacks in a thread of its own, so that a slow one holds up nothing that runs; or, ``inline``, in the
    thread that asks.

    Ctrl-C may come anywhere in here in the thread that gathers, so nothing but plain locks is held: the parts of
    ``threading`` that are written in Python can be interrupted before they have let go.

    Args:
        callbacks: in the order in which they are called.

    Attributes:
        active: whether there is anybody to call; without, posting is not worth the while.
        inline: whether the thread that drains is the one that calls.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self.active = bool(self._callbacks)
        self._queue: deque[tuple[str, Any]] = deque()
        self._lock = threading.Lock()
        self._to_do: SimpleQueue[bool] = SimpleQueue()  # whether there is something in the queue, or it is the end
        self._gates: list[threading.Lock] = []  # of those that wait until everything is called
        self._busy: int | None = None  # the thread that is calling
        self._thread: threading.Thread | None = None
        self._closed = False
        self.inline = False

    @property
    def in_callback(self) -> bool:
        """Whether the calling thread is in a callback."""
        return self._busy == threading.get_ident()

    def add(self, callback: Callback) -> None:
        self._callbacks = (*self._callbacks, callback)
        self.active = True

    def post(self, method: str, subjects: Iterable[Any]) -> None:
        """Have ``callback.<method>(subject)`` called for each subject, soon. Never calls anything itself.

        After :meth:`close` nothing is called.
        """
        calls = [(method, subject) for subject in subjects]
        with self._lock:
            if not self._closed:
                self._enqueue(calls)

    def _enqueue(self, calls: list[tuple[str, Any]]) -> None:
        self._queue.extend(calls)
        if self.inline:
            return
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name="evalkit-callbacks", daemon=True)
            thread.start()
            self._thread = thread  # only now: Ctrl-C may come before it has started, and then it cannot be joined
        self._to_do.put(True)

    def drain(self) -> None:
        """Return once everything posted so far has been called. In a callback, return at once."""
        if not self._callbacks or self.in_callback:
            return
        if self.inline:
            self._call_waiting()
            return
        gate = threading.Lock()
        gate.acquire()
        with self._lock:
            if self._is_idle():
                return
            self._gates.append(gate)
        while not gate.acquire(timeout=LOOK_UP) and not self._is_idle():
            pass

    def close(self) -> None:
        """Call what was posted, then ``on_close``, and end."""
        with self._lock:
            if self._callbacks and not self._closed:
                self._enqueue([("on_close", None)])
            self._closed = True
        self.drain()
        self._to_do.put(False)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _is_idle(self) -> bool:
        return not self._queue and self._busy is None

    def _serve(self) -> None:
        while self._to_do.get():
            self._call_waiting()

    def _call_waiting(self) -> None:
        """Take the calls that wait, until none is left; one thread at a time."""
        while self._queue:
            is_mine = False
            try:
                with self._lock:
                    if self._busy is not None:
                        return
                    self._busy = threading.get_ident()
                    is_mine = True
                while self._queue:
                    method, subject = self._queue.popleft()
                    for callback in self._callbacks:
                        self._call(getattr(callback, method), subject)
            finally:
                if is_mine:
                    with self._lock:
                        self._busy = None
                        while self._gates and not self._queue:
                            self._gates.pop().release()

    def _call(self, method: Callable[..., None], subject: Any) -> None:
        try:
            method() if subject is None else method(subject)
        except BaseException as exc:
            # In the thread that gathers, Ctrl-C is for who gathers. All else ends the callback alone, SystemExit too.
            if self.inline and isinstance(exc, KeyboardInterrupt):
                raise
            _log.exception("callback %s failed in %s", type(method.__self__).__name__, method.__name__)  # type: ignore[attr-defined]
