"""Lead: which thread reads what the workers say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from evalkit.interrupts import InterruptHeld, hears_only_interrupts

__all__ = ["Lead"]

_LONGEST = 0.020  # seconds for which it is lent, at most
_PAUSE = 0.002  # seconds for which the backend's thread stays away once another has led, and between two looks
_HANDOVER = 0.1  # seconds that the backend's thread may take to let go


class Lead:
    """Lets one thread read at a time: the backend's own, or for a moment one that waits for results.

    From the one to the other, a result takes two switches between threads, which take longer than all else that
    becomes of it. So who waits takes the lead. It is lent for short times only: the backend's thread takes it back
    where nobody comes for it within 2 ms, and nobody has it for long, since looking whether it is free takes CPU time.
    """

    def __init__(self) -> None:
        self._has_it = threading.Lock()
        self._borrowing = threading.Lock()
        self._wanted = False
        self._lent_until = 0.0

    def take(self) -> None:
        """Get it back, or keep it: called by the backend's thread, which gives it away after each turn."""
        while self._wanted or time.monotonic() < self._lent_until or not self._has_it.acquire(blocking=False):
            time.sleep(_PAUSE)

    def release(self) -> None:
        """The turn of the backend's thread is over."""
        self._has_it.release()

    def lend(
        self,
        turn: Callable[[float], bool],
        end_turn: Callable[[], None],
        done: Callable[[], bool],
        timeout: float | None,
    ) -> None:
        """Have this thread, which waits for results, take turns; for :meth:`evalkit.backends.Backend.lend`.

        Args:
            turn: ``turn(seconds)`` reads what comes within that time, and says whether it may be worth another turn.
            end_turn: ends the turn of the backend's thread, if it is in one.
            done: whether what is waited for has come.
            timeout: seconds; None for no limit.
        """
        if timeout is not None and timeout <= 0:
            return  # who only looks reads nothing, and is not to keep the backend's thread away
        if not hears_only_interrupts():
            return  # an alarm, say, would raise in the middle of what is read
        until = time.monotonic() + (_LONGEST if timeout is None else min(timeout, _LONGEST))
        with InterruptHeld():
            if not self._borrow(end_turn):
                return
            try:
                while not done() and (left := until - time.monotonic()) > 0 and turn(left):
                    pass
            finally:
                self._lent_until = time.monotonic() + _PAUSE
                self._has_it.release()
                self._borrowing.release()

    def _borrow(self, end_turn: Callable[[], None]) -> bool:
        """Get it; False if another thread has borrowed it."""
        if not self._borrowing.acquire(blocking=False):
            return False
        got = self._has_it.acquire(blocking=False)
        if not got:
            self._wanted = True
            end_turn()
            got = self._has_it.acquire(timeout=_HANDOVER)
            self._wanted = False
        if not got:
            self._borrowing.release()
        return got
