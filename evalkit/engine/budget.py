"""Budget: how many jobs, for how long, and whether the search goes on at all."""

from __future__ import annotations

import math
import threading
import time

from evalkit.engine.clock import Clock
from evalkit.engine.scheduler import Scheduler
from evalkit.errors import EvaluatorClosedError, MaximumJobsSpawnReached, SearchStoppedError

__all__ = ["Budget"]


class Budget:
    """What decides whether jobs are taken in. Once it is used up, the intake is closed and all is cancelled.

    Attributes:
        maximum: how many jobs may be submitted in all; None for no limit.
        closed: whether the evaluator is closed; set by :meth:`close` and in the forks of its process.
    """

    def __init__(self, scheduler: Scheduler, timers: Clock) -> None:
        self._scheduler = scheduler
        self._timers = timers
        self._ending = threading.Lock()
        self._stop_reason: str | None = None
        self._stops_running = False
        self._timeout: float | None = None
        self._deadline: float | None = None
        self._why_closed = "this evaluator is closed; create another one"
        self.maximum: int | None = None
        self.closed = False

    def check_open(self) -> None:
        """Raise ``EvaluatorClosedError`` after :meth:`close`."""
        if self.closed:
            raise EvaluatorClosedError(self._why_closed)

    def check_room(self, n: int, submitted: int) -> None:
        """Raise what keeps ``n`` jobs from being submitted after ``submitted`` others, if anything does."""
        self.check_open()
        if self._deadline is not None or self._stop_reason is not None:
            reason = self.stop_reason
            if reason is not None:
                raise SearchStoppedError(f"nothing more can be submitted: {reason}")
        if self.maximum is not None and submitted + n > self.maximum:
            raise MaximumJobsSpawnReached(self.maximum, submitted)

    @property
    def timeout(self) -> float | None:
        """Seconds from when it was set to the end; None for no limit."""
        return self._timeout

    def set_timeout(self, seconds: float | None) -> None:
        """Give the search so much time from now on; a search whose time was up goes on."""
        self.check_open()
        deadline = None if seconds is None or seconds == math.inf else time.monotonic() + seconds
        with self._ending:
            self._timeout, self._deadline = seconds, deadline
            self._take_in_again()
        if deadline is not None and seconds is not None:
            self._timers.call_later(seconds, self._run_out, deadline)

    @property
    def time_left(self) -> float:
        """Seconds until the timeout, at least 0.0; ``math.inf`` without one."""
        return math.inf if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def stop_reason(self) -> str | None:
        """Why nothing more can be submitted; None as long as it can."""
        if self._stop_reason is None and self.time_left <= 0.0:
            return f"the timeout of {self._timeout:g} s has passed"
        return self._stop_reason

    def stop(self, reason: str, *, running: bool) -> None:
        """End the search for good; the first reason counts.

        Args:
            running: whether what runs is asked to stop as well; once it was, it stays so.
        """
        with self._ending:
            if self._stop_reason is not None and (self._stops_running or not running):
                return
            self._stop_reason = self._stop_reason or reason
            self._stops_running = running
        self._scheduler.close_intake(reason, running=running)

    def close(self, why: str | None = None) -> None:
        """From now on nothing is taken in, whatever else is set. ``why`` is what a later use is told."""
        with self._ending:
            self.closed = True
            self._why_closed = why or self._why_closed

    def _run_out(self, deadline: float) -> None:
        if deadline == self._deadline and not self.closed:
            self._scheduler.close_intake(f"the timeout of {self._timeout:g} s has passed")
            with self._ending:
                if deadline != self._deadline:  # it was given more time just now
                    self._take_in_again()

    def _take_in_again(self) -> None:
        if self._stop_reason is None and not self.closed:
            self._scheduler.open_intake()
