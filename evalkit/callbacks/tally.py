"""Tally: the best so far and the failures by kind, at a cost a job that does not depend on history."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from evalkit.callbacks.hypervolume import ParetoFront, front_of
from evalkit.job import Job, JobState
from evalkit.usercode import attempt

__all__ = ["MISMATCH", "OTHER_KINDS", "Tally", "failure_kind", "one_line", "values_of"]

#: Kind of an objective with another number of values than the first one had.
MISMATCH = "MISMATCH"
#: Kind under which reported reasons are counted once there are too many different ones.
OTHER_KINDS = "F_…"
_MOST_KINDS = 100


def values_of(objective: Any) -> tuple[float, ...] | None:
    """The objective as floats, one or many; None if it is missing, a failure in words or not a real number."""
    return attempt(_floats, objective)[0]


def _floats(objective: Any) -> tuple[float, ...]:
    return tuple(map(float, objective)) if isinstance(objective, tuple) else (float(objective),)


def failure_kind(job: Job) -> str | None:
    """How a job failed, in a word; None if it did not.

    Returns:
        the cause of a FAILED job (``CRASH``, ``TIMEOUT``, ...; ``FAILED`` if it has none); of a job that is DONE, the
        ``"F_reason"`` it reported (on one line, at most 60 characters), or ``NaN`` or ``inf`` for an objective of which
        a value is not finite.
    """
    if job.state is JobState.FAILED:
        return "FAILED" if job.cause is None else job.cause.value
    if job.state is not JobState.DONE:
        return None
    objective = job.objective
    if isinstance(objective, str):
        return one_line(objective, 60)
    values = values_of(objective)
    if values is None or all(map(math.isfinite, values)):
        return None
    return "NaN" if any(map(math.isnan, values)) else "inf"


def one_line(text: str, longest: int) -> str:
    """The text without line breaks, cut to at most ``longest`` characters."""
    # What is far behind the cut is not worth splitting.
    text = " ".join(text[: 4 * longest].split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


class Tally:
    """Counts the jobs that ended, how they failed, and keeps the best objective.

    The best of one objective is its greatest value (its least with ``minimize``). Many objectives have no best value,
    so what counts there is the front: the results that no other result dominates. The first result says how many
    objectives there are; a later one of another number is a failure of kind :data:`MISMATCH`. Only jobs that are DONE
    bring results: the objective of a pruned job comes from less than a full evaluation.

    Args:
        minimize: smaller objectives are better; for many objectives, all of them.

    Attributes:
        ended: jobs that ended, whatever the end.
        cancelled: of these, the ones that were cancelled.
        pruned: of these, the ones that were pruned.
        kinds: failures by kind, as :func:`failure_kind` names them. After 100 kinds, a new one is counted as ``"F_…"``.
        best: the best value of a single objective; None before the first, and for many objectives.
        dimension: how many objectives a result has; 0 before the first result.
    """

    def __init__(self, *, minimize: bool = False) -> None:
        self.minimize = minimize
        self.ended = 0
        self.cancelled = 0
        self.pruned = 0
        self.kinds: Counter[str] = Counter()
        self.best: float | None = None
        self.dimension = 0
        self._failures = 0
        self._front: ParetoFront | None = None

    @property
    def failures(self) -> int:
        """How many jobs failed, of any kind."""
        return self._failures

    @property
    def front(self) -> list[tuple[float, ...]]:
        """The results of many objectives that no other dominates, as the run function returned them."""
        if self._front is None:
            return []
        return [tuple(-value for value in point) for point in self._front] if self.minimize else list(self._front)

    @property
    def front_size(self) -> int:
        """How many results :attr:`front` has."""
        return 0 if self._front is None else len(self._front)

    def add(self, job: Job) -> bool:
        """Count a job that ended; say whether its objective is better than all before (or enters the front)."""
        self.ended += 1
        if job.state is JobState.CANCELLED:
            self.cancelled += 1
            return False
        if job.state is JobState.PRUNED:
            self.pruned += 1
            return False
        kind = failure_kind(job)
        if kind is not None:
            self._fail(kind)
            return False
        values = values_of(job.objective)
        if values is None:
            return False
        if self.dimension == 0:
            self.dimension = len(values)
            if self.dimension > 1:
                self._front = front_of(self.dimension)
        if len(values) != self.dimension:
            self._fail(MISMATCH)
            return False
        if self._front is not None:
            return self._front.add(tuple(-value for value in values) if self.minimize else values)
        value = values[0]
        if self.best is None or (value < self.best if self.minimize else value > self.best):
            self.best = value
            return True
        return False

    def best_text(self) -> str:
        """The best so far in words: ``best 0.25``, ``front 12`` for many objectives, ``best none`` before a result."""
        if self._front is not None:
            return f"front {len(self._front)}"
        return "best none" if self.best is None else f"best {self.best:.6g}"

    def failures_text(self) -> str:
        """The failures in words, the most frequent kinds first: ``failures 3 (CRASH 2, F_diverged 1)``."""
        if not self._failures:
            return "failures 0"
        kinds = self.kinds.most_common(3)
        named = ", ".join(f"{kind} {count}" for kind, count in kinds)
        return f"failures {self._failures} ({named}{', …' if len(self.kinds) > len(kinds) else ''})"

    def _fail(self, kind: str) -> None:
        self._failures += 1
        if kind not in self.kinds and len(self.kinds) >= _MOST_KINDS:
            kind = OTHER_KINDS
        self.kinds[kind] += 1
