"""RetryPolicy: which failures are worth another attempt."""

from __future__ import annotations

from dataclasses import dataclass

from evalkit.job import JobCause

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many more attempts a job gets, by the kind of its failure.

    Attributes:
        exception, crash, timeout, memory, lost: attempts after the first, for failures of that cause.
        backoff: seconds to wait before another attempt; doubles with each.

    Raises:
        ValueError: a number is negative.
    """

    exception: int = 0
    crash: int = 0
    timeout: int = 0
    memory: int = 0
    lost: int = 0
    backoff: float = 0.0

    def __post_init__(self) -> None:
        for name in ("exception", "crash", "timeout", "memory", "lost", "backoff"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"RetryPolicy({name}=) takes a number of at least 0, not {value!r}")

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

    def allows(self, cause: JobCause, before: int) -> bool:
        """Whether a job that has failed by ``cause`` ``before`` times earlier, and now again, gets another attempt."""
        limits = {
            JobCause.EXCEPTION: self.exception,
            JobCause.CRASH: self.crash,
            JobCause.TIMEOUT: self.timeout,
            JobCause.MEMORY: self.memory,
            JobCause.LOST: self.lost,
        }
        return before < limits[cause]
