"""Waiting for MPI without keeping a core busy for long: MPI itself spins in every call that waits."""

from __future__ import annotations

import logging
import math
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Pauses", "wait_for"]

_log = logging.getLogger("evalkit")

_SHARE = 1 / 32  # of the time since something happened, by which a message is then late at most
_LONGEST = 0.010  # seconds
_PATIENCE = 30.0  # seconds after which it is said what is waited for


class Pauses:
    """Waiting between two looks for messages.

    For half a millisecond after something has happened, the core is only left to others that want it: to fall asleep
    and to wake up takes 0.1 ms, in which a message could go to and fro ten times. Then come sleeps that get longer.

    Args:
        brief: seconds in place of that half millisecond; 0 in a thread that is not to take the interpreter from others.
    """

    def __init__(self, brief: float = 0.0005) -> None:
        self._brief = brief
        self._since = time.monotonic()

    def restart(self) -> None:
        """Something has happened; more of it may follow at once."""
        self._since = time.monotonic()

    def make(self) -> None:
        """Make the next one."""
        waited = time.monotonic() - self._since
        if waited < self._brief:
            os.sched_yield()
        else:
            time.sleep(min(waited * _SHARE, _LONGEST))


def wait_for(request: MPI.Request, what: str = "") -> None:
    """Wait until a request is complete.

    Args:
        request: of a call that does not block.
        what: a sentence for the log, if it takes long.
    """
    pauses = Pauses()
    patient_until = time.monotonic() + _PATIENCE if what else math.inf
    while not request.Test():
        pauses.make()
        if time.monotonic() > patient_until:
            _log.warning("%s", what)
            patient_until = math.inf
