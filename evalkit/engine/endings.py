"""Endings that are asked for: of runs that are cancelled or out of time, by asking first and then by force."""

from __future__ import annotations

import threading
import time

from evalkit.backends.base import Backend
from evalkit.engine.clock import Clock
from evalkit.job import Job

__all__ = ["Endings"]


class Endings:
    """Runs that are to end, and when runs are to.

    Args:
        lock: of the scheduler.
        job_timeout: seconds that a run may take; None for no limit.
        grace: seconds between asking a run to stop and its end by force.

    Attributes:
        dooms: runs that were asked to stop: the job's id -> why. Those that are cancelled are CANCELLING; the others
            are out of time.
    """

    def __init__(
        self, backend: Backend, timers: Clock, lock: threading.Lock, job_timeout: float | None, grace: float
    ) -> None:
        self._backend = backend
        self._timers = timers
        self._lock = lock
        self._job_timeout = job_timeout
        # Backends that kill take up to a second from SIGTERM to SIGKILL; that second is part of the grace.
        self._patience = max(grace - 1.0, grace / 2)
        self.dooms: dict[str, str] = {}
        self._running: dict[str, tuple[float, Job]] = {}  # monotonic start, oldest first; only with a job_timeout
        self._timeout_scheduled = False

    def started(self, job: Job) -> None:
        """With the lock: its time counts from now, if there is a limit."""
        if self._job_timeout is None:
            return
        self._running.pop(job.id, None)
        self._running[job.id] = time.monotonic(), job
        if not self._timeout_scheduled:
            self._timeout_scheduled = True
            self._timers.call_later(self._job_timeout, self._check_timeouts)

    def over(self, job: Job) -> str | None:
        """With the lock: its run has ended. Return why it was to, if it was."""
        if self._running:
            self._running.pop(job.id, None)
        return self.dooms.pop(job.id, None) if self.dooms else None

    def ask(self, job: Job, attempt: int) -> None:
        """Without the lock: ask a run that is in :attr:`dooms` to stop, and see to it that it does."""
        self._backend.cancel(job.id, kill=False)
        with self._lock:
            if not self._is_doomed(job, attempt):
                return  # it is over already
        self._timers.call_later(self._patience, self._kill, job, attempt)

    def _is_doomed(self, job: Job, attempt: int) -> bool:
        return job.id in self.dooms and job.attempt == attempt

    def _kill(self, job: Job, attempt: int) -> None:
        with self._lock:
            if not self._is_doomed(job, attempt):
                return  # it has ended; what runs by now is another attempt
        self._backend.cancel(job.id, kill=True)

    def _check_timeouts(self) -> None:
        limit = self._job_timeout
        if limit is None:
            return
        due: list[tuple[Job, int]] = []
        with self._lock:
            now = time.monotonic()
            self._timeout_scheduled = False
            for since, job in self._running.values():
                if now - since < limit:
                    self._timeout_scheduled = True
                    self._timers.call_later(since + limit - now, self._check_timeouts)
                    break
                due.append((job, job.attempt))
            for job, _ in due:
                del self._running[job.id]
                self.dooms.setdefault(job.id, f"it ran longer than job_timeout={limit:g} s")
        for job, attempt in due:
            self.ask(job, attempt)
