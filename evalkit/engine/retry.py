"""RetryPolicy: which failures are worth another attempt."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

from evalkit.job import JobCause

__all__ = ["Retries", "RetryPolicy"]

_MAX_LOSSES = 10  # a job whose runs end so often by no fault of its own is taken to have a part in it
_LONGEST_BACKOFF = 300.0  # seconds, unless the first is longer
_JITTER = 0.25  # of a backoff, at most: what failed together does not come back together


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many more attempts a job gets, by the kind of its failure. Each kind has a number of its own.

    Runs that the engine lost by no fault of the job (its node went away, its batch job ran out of time) are repeated
    at once and use up none of these, ten times for each job. From then on they count as ``lost``, as do runs that
    could not be ended and were abandoned.

    Attributes:
        exception, crash, timeout, memory, lost: attempts after the first, for failures of that cause;
            ``math.inf`` is no limit.
        backoff: seconds to wait at least before another attempt. It doubles with each, up to 300 s, and up to a
            quarter is added at random, so that jobs which failed together do not all come back at once.

    Raises:
        ValueError: a number is negative, or no number.
    """

    exception: int | float = 0
    crash: int | float = 0
    timeout: int | float = 0
    memory: int | float = 0
    lost: int | float = 0
    backoff: float = 0.0

    def __post_init__(self) -> None:
        for name in ("exception", "crash", "timeout", "memory", "lost"):
            value = getattr(self, name)
            if value != math.inf and (type(value) is not int or value < 0):
                raise ValueError(f"RetryPolicy({name}=) takes an int of at least 0, or math.inf, not {value!r}")
        backoff = self.backoff
        if isinstance(backoff, bool) or not isinstance(backoff, int | float) or not 0 <= backoff < math.inf:
            raise ValueError(f"RetryPolicy(backoff=) takes seconds, at least 0, not {backoff!r}")

    @classmethod
    def of(cls, retries: int | RetryPolicy) -> RetryPolicy:
        """Read the ``retries`` that users write: a policy, or an int for crashes and losses.

        Raises:
            ValueError: it is neither.
        """
        if isinstance(retries, RetryPolicy):
            return retries
        if type(retries) is not int or retries < 0:
            raise ValueError(f"retries takes an int of at least 0 or a RetryPolicy, not {retries!r}")
        return cls(crash=retries, lost=retries)

    def limit(self, cause: JobCause) -> int | float:
        """How many more attempts failures of this cause give."""
        limits = {
            JobCause.EXCEPTION: self.exception,
            JobCause.CRASH: self.crash,
            JobCause.TIMEOUT: self.timeout,
            JobCause.MEMORY: self.memory,
            JobCause.LOST: self.lost,
        }
        return limits[cause]

    def delay(self, failures: int) -> float:
        """Seconds to wait before another attempt, of a job that has failed so often."""
        longest = max(self.backoff, _LONGEST_BACKOFF)
        # So many doublings lead from any backoff that matters to the longest.
        delay = min(self.backoff * 2.0 ** min(failures - 1, 40), longest)
        return delay * (1.0 + _JITTER * random.random())  # noqa: S311 - no secret


class Retries:
    """What the jobs of one evaluator have used up of their retries.

    Attributes:
        spent: by job, for those that had a failure or a loss: how many, by cause; None is for losses by no fault of
            the job.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self.spent: dict[str, Counter[JobCause | None]] = {}

    def after(self, job_id: str, cause: JobCause) -> float | None:
        """Take a retry for a run that failed by ``cause``; return the seconds to wait before it, None without one."""
        limit = self._policy.limit(cause)
        if not limit:
            return None
        spent = self.spent.setdefault(job_id, Counter())
        if spent[cause] >= limit:
            return None
        spent[cause] += 1
        return self._policy.delay(spent.total() - spent[None])

    def after_loss(self, job_id: str) -> bool:
        """Whether a run that was lost by no fault of the job is repeated without using up a retry."""
        spent = self.spent.setdefault(job_id, Counter())
        spent[None] += 1
        return spent[None] <= _MAX_LOSSES

    def forget(self, job_id: str) -> None:
        """The job has ended."""
        self.spent.pop(job_id, None)
