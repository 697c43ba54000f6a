"""Waiters: threads that wait until enough jobs have ended."""

from __future__ import annotations

import threading

from evalkit.job import Job

__all__ = ["AllWaiter", "BatchWaiter", "JobWaiter", "Waiter"]


class Waiter:
    """One thread that waits. The scheduler asks and tells it with its lock held; waiting takes no lock and no CPU."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self.done = False

    def ended(self, job: Job) -> None:
        """A job has ended."""

    def satisfied(self, finished: int, out: int) -> bool:
        """Whether there is nothing left to wait for.

        Args:
            finished: how many jobs have ended and were not gathered yet.
            out: how many have not ended.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Let the thread go on."""
        if not self.done:
            self.done = True
            self._gate.release()

    def wait(self, timeout: float | None) -> bool:
        """Wait to be released, at most ``timeout`` seconds; say whether that came."""
        if self._gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            self._gate.release()
            return True
        return self.done


class BatchWaiter(Waiter):
    """Waits for ``size`` jobs, or for as many as there can be."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def satisfied(self, finished: int, out: int) -> bool:
        return finished >= min(self._size, finished + out)


class AllWaiter(Waiter):
    """Waits for the ``missing`` jobs up to number ``last``; what is submitted later is not waited for."""

    def __init__(self, missing: int, last: int) -> None:
        super().__init__()
        self._missing = missing
        self._last = last

    def ended(self, job: Job) -> None:
        if job.number <= self._last:
            self._missing -= 1

    def satisfied(self, finished: int, out: int) -> bool:
        return self._missing <= 0


class JobWaiter(Waiter):
    """Waits for one job."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def satisfied(self, finished: int, out: int) -> bool:
        return self._job.is_complete
