"""How many jobs travel in one call of an executor."""

from __future__ import annotations

__all__ = ["ChunkSizer"]

_SHARE = 0.05  # of the time of a call may be what the call itself costs
_MAX_SIZE = 512  # jobs
_GROWTH = 4  # times the size before, at most, from one result to the next
_FIRST_COST = 0.001  # seconds a call is taken to cost before one was measured
_WEIGHT = 0.3  # of the newest measurement in a mean


class ChunkSizer:
    """Sizes the chunks of one executor from what its calls and its jobs were measured to take.

    A chunk is as long as makes the cost of its call a twentieth of the whole. Until something is known, and where jobs
    take longer than that, each job travels alone.

    Args:
        enabled: False for one job a call, always.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._cost = _FIRST_COST
        self._per_job: float | None = None
        self._least = 1  # jobs that take as long as the call they are in
        #: Jobs in a full chunk.
        self.size = 1

    def note(self, jobs: int, seconds: float, round_trip: float) -> None:
        """A call has come back.

        Args:
            jobs: how many ran in it.
            seconds: how long the worker was at it.
            round_trip: seconds from sending it to having its result.
        """
        if not self._enabled or not jobs:
            return
        # A worker that starts, or a core that is wanted elsewhere, makes a call look dear: only cheaper ones are
        # believed at once.
        cost = max(round_trip - seconds, 1e-5)
        self._cost = cost if cost < self._cost else self._cost + _WEIGHT * (min(cost, 2 * self._cost) - self._cost)
        per_job = max(seconds / jobs, 1e-7)
        # Jobs that take longer than the mean are believed at once: too small a chunk costs less than too large a one.
        mean = self._per_job
        self._per_job = per_job if mean is None or per_job > mean else mean + _WEIGHT * (per_job - mean)
        fits = int(self._cost / _SHARE / self._per_job)
        self.size = max(1, min(fits, _MAX_SIZE, _GROWTH * self.size))
        self._least = max(1, min(int(self._cost / self._per_job), self.size))

    def share(self, waiting: int, workers: int, is_tail: bool) -> int:
        """How many of the jobs that wait go into the next call: the last are spread over the workers.

        Args:
            workers: that may yet take some of them.
            is_tail: whether others are at work, so that it is better to come to an end than to make calls that take
                longer than their jobs, this one or a last one for what it would leave.
        """
        count = -(-waiting // max(1, workers))
        if is_tail:
            count = max(count, self._least)
            if waiting - count < self._least:
                count = waiting
        return min(waiting, self.size, count)
