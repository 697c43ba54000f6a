"""Waiters: threads that wait until enough jobs have ended."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right

from evalkit.job import Job

__all__ = ["LOOK_UP", "AllWaiter", "BatchWaiter", "JobWaiter", "Waiter"]

#: Seconds after which the main thread looks up: Python does not hear a signal that came just before it began to wait.
LOOK_UP = 0.2


class Waiter:
    """One thread that waits. The scheduler asks and tells it with its lock held; waiting takes no lock and no CPU.

    Who waits makes it, and hands it back if it is interrupted: whatever it was given by then is then not lost.

    Attributes:
        done: whether it was released.
        jobs: what it was given when it was released; nobody else gets them.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self.done = False
        self.jobs: list[Job] = []

    def begin(self, out: int, finished: int, last: int) -> None:
        """It starts to wait.

        Args:
            out: how many jobs have not ended.
            finished: how many have ended and were given to nobody yet.
            last: the number of the job that was submitted last.
        """

    def ended(self, jobs: list[Job]) -> None:
        """These jobs have ended."""

    def satisfied(self, finished: int, out: int) -> bool:
        """Whether there is nothing left to wait for.

        Args:
            finished: how many jobs have ended and were given to nobody yet.
            out: how many have not ended.
        """
        raise NotImplementedError

    def choose(self, finished: dict[int, Job]) -> list[Job]:
        """Which of the jobs that have ended it takes along."""
        return []

    def release(self, finished: dict[int, Job]) -> None:
        """Let the thread go on, with its jobs."""
        self.jobs = self.choose(finished)
        if len(self.jobs) == len(finished):
            finished.clear()
        else:
            for job in self.jobs:
                del finished[job.number]
        self.done = True
        self._gate.release()

    def wait(self, timeout: float | None) -> bool:
        """Wait to be released, at most ``timeout`` seconds; say whether that came."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        longest = LOOK_UP if threading.current_thread() is threading.main_thread() else threading.TIMEOUT_MAX
        while not self._gate.acquire(timeout=min(max(0.0, deadline - time.monotonic()), longest)):
            if time.monotonic() >= deadline:
                return self.done
        self._gate.release()
        return True


class BatchWaiter(Waiter):
    """Waits for ``size`` jobs, or for all if fewer are out, and takes whatever has ended by then, in that order.

    Attributes:
        out: how many were out.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self.out = 0

    def begin(self, out: int, finished: int, last: int) -> None:
        self.out = out + finished
        self._size = min(self._size, self.out)

    def satisfied(self, finished: int, out: int) -> bool:
        return finished >= self._size or out == 0

    def choose(self, finished: dict[int, Job]) -> list[Job]:
        return list(finished.values())


class AllWaiter(Waiter):
    """Waits for every job that is out when it begins and takes those, in the order of submission."""

    def begin(self, out: int, finished: int, last: int) -> None:
        self._missing = out
        self._last = last

    def ended(self, jobs: list[Job]) -> None:
        last = self._last
        self._missing -= sum([job.number <= last for job in jobs])

    def satisfied(self, finished: int, out: int) -> bool:
        return self._missing <= 0

    def choose(self, finished: dict[int, Job]) -> list[Job]:
        numbers = sorted(finished)
        return [finished[number] for number in numbers[: bisect_right(numbers, self._last)]]


class JobWaiter(Waiter):
    """Waits for one job, and leaves it to who gathers."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def satisfied(self, finished: int, out: int) -> bool:
        return self._job.is_complete
