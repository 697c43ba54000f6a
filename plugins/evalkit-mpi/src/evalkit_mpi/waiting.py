"""Waiting for MPI without keeping a core busy: MPI itself spins in every call that waits, mpi4py.futures does not."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Pauses", "wait_for"]

_log = logging.getLogger("evalkit")

_SHORTEST = 1e-6  # seconds
_LONGEST = 0.005
_PATIENCE = 30.0  # seconds after which it is said what is waited for


class Pauses:
    """Sleeps that get longer as long as nothing happens, up to 5 ms."""

    def __init__(self) -> None:
        self._next = _SHORTEST

    def restart(self) -> None:
        """Something has happened; more of it may follow at once."""
        self._next = _SHORTEST

    def sleep(self) -> None:
        time.sleep(self._next)
        self._next = min(2 * self._next, _LONGEST)


def wait_for(request: MPI.Request, what: str = "") -> None:
    """Wait until a request is complete.

    Args:
        request: of a call that does not block.
        what: a sentence for the log, if it takes long.
    """
    pauses = Pauses()
    patient_until = time.monotonic() + _PATIENCE if what else math.inf
    while not request.Test():
        pauses.sleep()
        if time.monotonic() > patient_until:
            _log.warning("%s", what)
            patient_until = math.inf
