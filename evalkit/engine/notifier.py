"""Notifier: calls the callbacks, one at a time, in the order of events."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from evalkit.callbacks.base import Callback

__all__ = ["Notifier"]

_log = logging.getLogger("evalkit")


class Notifier:
    """Calls callbacks in a thread of its own, so that a slow one holds up nothing that runs; or, ``inline``, in the
    thread that asks.

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
        self._changed = threading.Condition()
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
        with self._changed:
            if not self._closed:
                self._enqueue((method, subject) for subject in subjects)

    def _enqueue(self, calls: Iterable[tuple[str, Any]]) -> None:
        self._queue.extend(calls)
        if self.inline:
            return
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name="evalkit-callbacks", daemon=True)
            thread.start()
            self._thread = thread  # only now: Ctrl-C may come before it has started, and then it cannot be joined
        elif self._busy is None:
            self._changed.notify_all()

    def drain(self) -> None:
        """Return once everything posted so far has been called. In a callback, return at once."""
        if not self._callbacks or self.in_callback:
            return
        if self.inline:
            self._call_waiting()
            return
        with self._changed:
            while self._queue or self._busy is not None:
                self._changed.wait()

    def close(self) -> None:
        """Call what was posted, then ``on_close``, and end."""
        with self._changed:
            if self._callbacks and not self._closed:
                self._enqueue([("on_close", None)])
            self._closed = True
            self._changed.notify_all()
        self.drain()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
            self._call_waiting()

    def _call_waiting(self) -> None:
        """Take the calls that wait, until none is left; one thread at a time."""
        while self._queue:
            with self._changed:
                if self._busy is not None:
                    return
                self._busy = threading.get_ident()
            try:
                while self._queue:
                    method, subject = self._queue.popleft()
                    for callback in self._callbacks:
                        self._call(getattr(callback, method), subject)
            finally:
                with self._changed:
                    self._busy = None
                    self._changed.notify_all()

    def _call(self, method: Callable[..., None], subject: Any) -> None:
        try:
            method() if subject is None else method(subject)
        except BaseException as exc:
            # In the thread that gathers, Ctrl-C is for who gathers. All else ends the callback alone, SystemExit too.
            if self.inline and isinstance(exc, KeyboardInterrupt):
                raise
            _log.exception("callback %s failed in %s", type(method.__self__).__name__, method.__name__)  # type: ignore[attr-defined]
