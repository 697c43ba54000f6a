"""Waiting for MPI without keeping a core busy: MPI itself spins in every call that waits, mpi4py.futures does not."""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Pauses", "exact_sleeps", "wait_for"]

_log = logging.getLogger("evalkit")

_SHORTEST = 1e-6  # seconds
_LONGEST = 0.005
_PATIENCE = 30.0  # seconds after which it is said what is waited for
_SLACK = 10_000  # nanoseconds by which a sleep may be too long; with less, looking takes the cores from the jobs
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30


@contextmanager
def exact_sleeps() -> Iterator[None]:
    """In this block, and in threads that are started in it, have short sleeps be short.

    Linux lets every sleep last up to 50 us longer, to save wake-ups. Looks at what has come, which begin 1 us apart,
    would be 50 us apart, and each message late by as much.
    """
    before = _prctl(_PR_GET_TIMERSLACK, 0)
    if before > _SLACK:
        _prctl(_PR_SET_TIMERSLACK, _SLACK)
    try:
        yield
    finally:
        if before > _SLACK:
            _prctl(_PR_SET_TIMERSLACK, before)


def _prctl(option: int, value: int) -> int:
    if sys.platform != "linux":
        return 0
    unused = ctypes.c_ulong(0)
    return int(ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), unused, unused, unused))


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
