"""EarlyStopping: stops a search that is good enough, or that has stopped improving."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Sequence

from evalkit.callbacks.base import Callback
from evalkit.callbacks.hypervolume import ParetoFront, front_of, hypervolume
from evalkit.callbacks.tally import failure_kind, values_of
from evalkit.job import Job, JobState

__all__ = ["EarlyStopping"]

logger = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Stops the evaluator once, for want of improvement or because a threshold is reached.

    One objective improves when it passes the best by more than ``min_delta``. Many objectives improve when a result
    makes the hypervolume of the Pareto front (Zitzler and Thiele, *Multiobjective optimization using evolutionary
    algorithms: a comparative case study*, PPSN V, 1998) grow by more than ``min_delta``. Small steps add up: what
    counts is the way made since the last improvement. The first result is an improvement.

    The hypervolume is measured from ``reference``. Without one, from the worst value seen of each objective; then a
    bad result moves the reference, which is no improvement: growth is what one result adds, measured from one and the
    same point. A result at the edge of what was seen adds no volume there, so as long as ``min_delta`` is 0, entering
    the front is enough. For a threshold on many objectives give a reference: a volume measured from a point that
    moves compares badly.

    Failed jobs, pruned jobs, jobs without an objective and failed objectives (``"F_…"``, NaN, infinities) count towards
    ``patience`` and are never an improvement. Cancelled jobs count for nothing: they say nothing about the search.
    Jobs that others ended in the same search count like one's own.

    Args:
        patience: how many jobs in a row may end without improvement; at the last of them the search stops.
        threshold: the search stops when the objective reaches it (at or above; at or below with ``minimize``); for many
            objectives, when the hypervolume reaches it.
        minimize: smaller objectives are better; for many objectives, all of them.
        min_delta: how much better is better, in the unit of the objective (of the hypervolume, for many).
        reference: for many objectives, a point that is worse than every result of interest, in the order and the
            units of the objectives.

    Raises:
        ValueError: neither ``patience`` nor ``threshold`` is given, or a value is out of its range.

    Attributes:
        reason: why it stopped the evaluator; None while it has not.
    """

    def __init__(
        self,
        patience: int | None = None,
        threshold: float | None = None,
        *,
        minimize: bool = False,
        min_delta: float = 0.0,
        reference: Sequence[float] | None = None,
    ) -> None:
        if patience is None and threshold is None:
            raise ValueError(
                "early stopping needs patience (jobs without improvement), threshold (an objective) or both"
            )
        self._minimize = minimize
        self._patience = None if patience is None else _count(patience, "patience")
        self._threshold = None if threshold is None else _finite(threshold, "threshold")
        self._goal = None if self._threshold is None else self._upwards((self._threshold,))[0]
        self._min_delta = _finite(min_delta, "min_delta")
        if self._min_delta < 0.0:
            raise ValueError(f"min_delta is how much better is better, 0 or more; got {min_delta!r}")
        self._given: tuple[float, ...] | None = None
        if reference is not None:
            self._given = self._upwards(tuple(_finite(value, "reference") for value in reference))
            if len(self._given) < 2:
                raise ValueError(f"reference has one value for each of two or more objectives; got {reference!r}")
        self.reason: str | None = None
        self._dimension = 0 if self._given is None else len(self._given)
        self._waited = 0
        # Objectives are negated when they are minimised, so that from here on greater is better.
        self._best: float | None = None
        self._mark = 0.0  # the best at the last improvement
        self._front: ParetoFront | None = None
        self._worst: tuple[float, ...] | None = self._given
        self._volume = 0.0
        self._gained = 0.0  # hypervolume since the last improvement
        self._grew = (
            False  # whether the last job made it grow: only a result may reach the threshold, not a moved reference
        )

    def on_done(self, job: Job) -> None:
        if self.reason is not None or job.state is JobState.CANCELLED:
            return
        improved = self._grew = False
        if job.state is JobState.DONE and failure_kind(job) is None:
            values = values_of(job.objective)
            if values is not None and self._fits(job, len(values)):
                point = self._upwards(values)
                improved = self._take_one(point[0]) if len(point) == 1 else self._take_many(point)
        if improved:
            self._waited = 0
        else:
            self._waited += 1
        self._judge()

    def on_done_other(self, job: Job) -> None:
        self.on_done(job)

    def _upwards(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(-value for value in values) if self._minimize else values

    def _fits(self, job: Job, dimension: int) -> bool:
        if self._dimension == 0:
            self._dimension = dimension
        if dimension == self._dimension:
            return True
        logger.warning(
            "EarlyStopping: job %s has %d objectives where %d are expected; it counts as no improvement",
            job.id,
            dimension,
            self._dimension,
        )
        return False

    def _take_one(self, value: float) -> bool:
        if self._best is not None:
            self._best = max(self._best, value)
            if self._best - self._mark <= self._min_delta:
                return False
        else:
            self._best = value
        self._mark = self._best
        return True

    def _take_many(self, point: tuple[float, ...]) -> bool:
        first = self._front is None
        if self._front is None:
            self._front = front_of(len(point))
        # Volumes are costly with many objectives, so none is computed that nobody asks for.
        if self._given is not None or self._min_delta > 0.0 or self._threshold is not None:
            reference = self._reference_with(point)
            growth = self._front.growth(point, reference)
            self._volume += growth
            self._gained += growth
            self._grew = growth > 0.0
        entered = self._front.add(point)
        by_front = self._given is None and self._min_delta == 0.0
        improved = entered if by_front else self._gained > self._min_delta
        if improved or first:
            self._gained = 0.0
            return True
        return False

    def _reference_with(self, point: tuple[float, ...]) -> tuple[float, ...]:
        """The point to measure from, moved first if this result is the worst seen in some objective."""
        if self._given is not None:
            return self._given
        worst = point if self._worst is None else tuple(map(min, self._worst, point))
        if worst != self._worst:
            self._worst = worst
            self._volume = hypervolume(self._front or (), worst)
        return worst

    def _judge(self) -> None:
        if self._goal is not None and self._threshold is not None:
            if self._best is not None and self._best >= self._goal:
                best = -self._best if self._minimize else self._best
                self._stop(f"the objective {best:.6g} has reached the threshold {self._threshold:.6g}")
                return
            if self._grew and self._volume >= self._threshold:
                self._stop(f"the hypervolume {self._volume:.6g} has reached the threshold {self._threshold:.6g}")
                return
        if self._patience is not None and self._waited >= self._patience:
            jobs = "1 job" if self._patience == 1 else f"{self._patience} jobs in a row"
            self._stop(f"{jobs} ended without improvement")

    def _stop(self, reason: str) -> None:
        self.reason = reason
        if self.evaluator is not None:
            self.evaluator.stop(reason)


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is a whole number of jobs, 1 or more; got {value!r}")
    return int(value)


def _finite(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} needs finite numbers, got {value!r}")
    return float(value)
