"""Pacing: how far jobs may run ahead of the storage."""

from __future__ import annotations

from evalkit.backends.events import Done, Failed
from evalkit.engine.recorder import Recorder

__all__ = ["Pacing"]

_WORTH_IT = 0.005  # seconds; a write costs a small part of a job that takes longer
_WEIGHT = 0.2  # of the latest run in the mean


class Pacing:
    """Holds back jobs while the ends of others are not in the storage yet, so that a kill costs little.

    Where results outlive this process and jobs take long enough, no more configurations are running, or over and not
    written, than there are workers: those are what a resume runs again. Short jobs run ahead, since waiting would cost
    more than repeating them; so do all while the storage is away.
    """

    def __init__(self, recorder: Recorder, num_workers: int) -> None:
        self._recorder = recorder
        self._num_workers = num_workers
        self._mean: float | None = None
        #: Whether ends are to be written at once, since jobs wait for that.
        self.strict = recorder.durable

    def note(self, run: Done | Failed) -> None:
        """A run has ended."""
        if self._recorder.durable and run.measured is not None:
            start, end, _, _ = run.measured
            took = (end or start) - start
            self._mean = took if self._mean is None else self._mean + _WEIGHT * (took - self._mean)
            self.strict = self._mean >= _WORTH_IT

    def room(self, in_backend: int) -> int | None:
        """How many more jobs may be started beside those that are in the backend; None for any number."""
        if not self.strict or self._recorder.away:
            return None
        return max(0, self._num_workers - in_backend - self._recorder.unwritten)
