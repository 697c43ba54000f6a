"""Lead: which thread reads what the workers say."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Lead"]

_PAUSE = 0.002  # seconds for which the pool's thread stays away after another has led, and between its looks meanwhile
_HANDOVER = 0.1  # seconds that the pool's thread may take to let go


class Lead:
    """Lets one thread read at a time: the pool's own, or for a moment one that waits for results.

    From the one to the other, a result takes two switches between threads, which take longer than all else that
    becomes of it. So who waits takes the lead. It is lent for short times only: the pool's thread takes it back where
    nobody comes for it within 2 ms, and nobody has it for long, since looking whether it is free takes CPU time.
    """

    def __init__(self) -> None:
        self._has_it = threading.Lock()
        self._borrowing = threading.Lock()
        self._wanted = False
        self._lent_until = 0.0

    def take(self) -> None:
        """Get it back, or keep it: called by the pool's thread, which gives it away after each turn."""
        while self._wanted or time.monotonic() < self._lent_until or not self._has_it.acquire(blocking=False):
            time.sleep(_PAUSE)

    def release(self) -> None:
        """The turn of the pool's thread is over."""
        self._has_it.release()

    def borrow(self, end_turn: Callable[[], None]) -> bool:
        """Get it; False if another thread has borrowed it.

        Args:
            end_turn: ends the turn of the pool's thread, if it has it.
        """
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

    def give_back(self) -> None:
        """Have no more use for it now; perhaps soon."""
        self._lent_until = time.monotonic() + _PAUSE
        self._has_it.release()
        self._borrowing.release()
