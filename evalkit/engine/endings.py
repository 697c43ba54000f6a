"""Endings that are asked for: of runs that are cancelled or out of time, by asking first and then by force."""

from __future__ import annotations

import math
import threading
import time

from evalkit.backends.base import Backend
from evalkit.backends.events import Measured
from evalkit.engine.clock import Clock
from evalkit.job import Job, JobState

__all__ = ["Endings"]


class Endings:
    """Asks runs to stop, on a cancel or when their time is over, and kills those that do not.

    Args:
        lock: of the scheduler.
        job_timeout: seconds that a run may take; None for no limit.
        output_timeout: seconds that the output of a run may take to arrive, if there is a ``job_timeout``.
        grace: seconds between asking a run to stop and its end by force.

    Attributes:
        dooms: runs that were asked to stop: the job's id -> why. Those that are cancelled are CANCELLING; the others
            are out of time.
    """

    def __init__(
        self,
        backend: Backend,
        timers: Clock,
        lock: threading.Lock,
        *,
        job_timeout: float | None,
        output_timeout: float,
        grace: float,
    ) -> None:
        self._backend = backend
        self._timers = timers
        self._lock = lock
        self._job_timeout = math.inf if job_timeout is None else job_timeout
        self._output_timeout = output_timeout
        # Backends that kill take up to a second from SIGTERM to SIGKILL; that second is part of the grace.
        self._patience = max(grace - 1.0, grace / 2)
        self.dooms: dict[str, str] = {}
        self._limits: dict[str, tuple[float, Job, str]] = {}  # when a run is out of time, and what it has exceeded then
        self._next_check = math.inf

    def started(self, job: Job, clock: float | None) -> None:
        """With the lock: a run has started, now or at this time on the monotonic clock."""
        if self._job_timeout < math.inf:
            age = 0.0 if clock is None else time.monotonic() - clock
            limit = self._job_timeout
            self._set_limit(job, limit - age, f"it ran longer than job_timeout={limit:g} s")

    def ended(self, job: Job, measured: Measured) -> None:
        """With the lock: a run has ended, and its output is on the way."""
        self.arrived(job, measured)
        if self._in_time(job, measured):
            limit = self._output_timeout
            self._set_limit(job, limit, f"its output did not arrive within output_timeout={limit:g} s after its run")

    def arrived(self, job: Job, measured: Measured | None) -> None:
        """With the lock: a run has ended, and its output is here, though nobody has read it yet.

        Args:
            measured: None if the run did not come to its own end.
        """
        self._limits.pop(job.id, None)
        if job.id not in self.dooms or job.state is JobState.CANCELLING or measured is None:
            return
        if self._in_time(job, measured):
            del self.dooms[job.id]

    def over(self, job: Job, measured: Measured | None = None) -> str | None:
        """With the lock: there is nothing more to come of a run. Return why it was to end, if it was.

        Args:
            measured: of a run that came to its own end. If that was in time, it counts, whatever was asked of the run
                since: the program may have been late to hear of it.
        """
        if self._limits:
            self._limits.pop(job.id, None)
        doom = self.dooms.pop(job.id, None) if self.dooms else None
        return None if doom is not None and measured is not None and self._in_time(job, measured) else doom

    def ask(self, job: Job, attempt: int) -> None:
        """Without the lock: ask a run that is in :attr:`dooms` to stop, and see to it that it does."""
        self._cancel(job, attempt, kill=False)
        self._timers.judge_later(self._patience, self._cancel, job, attempt, True)

    def _in_time(self, job: Job, measured: Measured) -> bool:
        """Whether a run ended within its limit, and so before it can have heard that it was to stop.

        As the limit does, this counts from when the worker said that it starts; the run itself may have begun later.
        """
        start, end = job.status.start_timestamp, measured[1]
        begin = measured[0] if start is None else min(start, measured[0])
        return end is not None and end - begin < self._job_timeout < math.inf

    def _cancel(self, job: Job, attempt: int, kill: bool) -> None:
        with self._lock:
            if job.id not in self.dooms or job.attempt != attempt:
                return  # it is over; what runs by now is another attempt
        self._backend.cancel(job.id, kill)

    def _set_limit(self, job: Job, seconds: float, reason: str) -> None:
        due = time.monotonic() + seconds
        self._limits[job.id] = due, job, reason
        if due < self._next_check:
            self._next_check = due
            self._timers.judge_later(max(0.0, seconds), self._check_limits, due)

    def _check_limits(self, due: float) -> None:
        out_of_time: list[tuple[Job, int]] = []
        with self._lock:
            if self._next_check != due:
                return  # another check comes sooner, or has
            now = time.monotonic()
            for due, job, reason in list(self._limits.values()):
                if due <= now:
                    out_of_time.append((job, job.attempt))
                    del self._limits[job.id]
                    self.dooms.setdefault(job.id, reason)
            self._next_check = min((due for due, _, _ in self._limits.values()), default=math.inf)
            self._timers.judge_later(max(0.0, self._next_check - now), self._check_limits, self._next_check)
        for job, attempt in out_of_time:
            self.ask(job, attempt)
