"""Clock: calls that are due at some time, in one thread that exists only if something is ever due."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Clock"]

_log = logging.getLogger("evalkit")


_LATE = 0.1  # seconds by which a call is late if the program could not run
_CATCH_UP = 0.25  # seconds that the program has then to read what has come meanwhile
_POSTPONEMENTS = 5  # of one call, at most

_Entry = tuple[float, int, Callable[..., None], tuple[Any, ...], int]  # the last is how often it may be postponed


class Clock:
    """Calls functions when they are due, one after the other: what may take long is for a clock of its own.

    Args:
        name: of its thread.
    """

    def __init__(self, name: str = "evalkit-clock") -> None:
        self._name = name
        self._heap: list[_Entry] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def call_later(self, delay: float, function: Callable[..., None], *args: Any) -> None:
        """Have ``function(*args)`` called after ``delay`` seconds, ``math.inf`` being never.

        After :meth:`close` nothing is called.
        """
        self._add(delay, function, args, 0)

    def judge_later(self, delay: float, function: Callable[..., None], *args: Any) -> None:
        """As :meth:`call_later`, for a call that judges whether something has come in time.

        The program may be stopped by Ctrl-Z, or one of its threads may hold the interpreter. What has come meanwhile is
        read only afterwards; so a call that is late for this reason is made a moment later still, a few times at most.
        """
        self._add(delay, function, args, _POSTPONEMENTS)

    def _add(self, delay: float, function: Callable[..., None], args: tuple[Any, ...], postponements: int) -> None:
        if delay == math.inf:
            return
        entry = (time.monotonic() + delay, next(self._order), function, args, postponements)
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._heap, entry)
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                thread.start()
                self._thread = thread  # only now: Ctrl-C may come before it has started, and then it cannot be joined
            elif self._heap[0] is entry:
                self._changed.notify()

    def close(self) -> None:
        """Call nothing more, and wait for the call that is under way, if this is not it."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(10.0)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._heap or self._heap[0][0] > time.monotonic()):
                    left = self._heap[0][0] - time.monotonic() if self._heap else math.inf
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                if self._closed:
                    return
                due, order, function, args, postponements = heapq.heappop(self._heap)
                now = time.monotonic()
                if postponements and now - due > _LATE:
                    heapq.heappush(self._heap, (now + _CATCH_UP, order, function, args, postponements - 1))
                    continue
            try:
                function(*args)
            except BaseException:  # noqa: BLE001 - the clock goes on, whatever it calls
                with contextlib.suppress(Exception):  # a job may have closed the stream that this goes to
                    _log.exception("a timed call failed: %r", function)
