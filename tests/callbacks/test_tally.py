from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from evalkit.callbacks.tally import MISMATCH, OTHER_KINDS, Tally
from evalkit.job import Job, JobCause, JobState

Ended = Callable[..., Job]


@pytest.mark.parametrize(("minimize", "best", "better"), [(False, 3.0, [0, 2]), (True, -1.0, [0, 1])])
def test_best_of_one_objective(ended: Ended, minimize: bool, best: float, better: list[int]) -> None:
    tally = Tally(minimize=minimize)
    outputs = [1, np.float32(-1.0), {"objective": 3.0}, Decimal("0.5"), math.nan, math.inf, "F_x", None, "words", 1j]
    improved = [tally.add(ended(output)) for output in outputs]
    assert [index for index, one in enumerate(improved) if one] == better
    assert tally.best == best
    assert tally.best_text() == f"best {best:g}"
    assert tally.ended == 10
    assert tally.kinds == {"NaN": 1, "inf": 1, "F_x": 1}


@pytest.mark.parametrize(
    ("minimize", "front"), [(False, [(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)]), (True, [(1.0, 3.0), (3.0, 1.0), (0.0, 4.0)])]
)
def test_front_of_many_objectives(ended: Ended, minimize: bool, front: list[tuple[float, ...]]) -> None:
    tally = Tally(minimize=minimize)
    outputs: list[Any] = [(1, 3), [3, 1], (2, 2), (3, math.nan), (1, 2, 3), 5.0]
    for output in [*outputs, (0, 4) if minimize else (2, 1)]:
        tally.add(ended(output))
    if minimize:
        front = [*front, (2.0, 2.0)]
    assert sorted(tally.front) == sorted(front)
    assert tally.front_size == len(front)
    assert tally.best is None
    assert tally.best_text() == f"front {len(front)}"
    assert tally.kinds == {"NaN": 1, MISMATCH: 2}


def test_failures_by_kind(ended: Ended, crashed: Callable[[], Job]) -> None:
    tally = Tally()
    assert tally.best_text() == "best none"
    assert tally.failures_text() == "failures 0"
    jobs = [crashed(), crashed(), ended(state=JobState.FAILED, cause=JobCause.TIMEOUT), ended(state=JobState.FAILED)]
    jobs += [ended("F_oom"), ended(state=JobState.CANCELLED), ended(5.0, state=JobState.PRUNED)]
    assert not any(map(tally.add, jobs))
    assert tally.kinds == {"CRASH": 2, "TIMEOUT": 1, "FAILED": 1, "F_oom": 1}
    assert (tally.ended, tally.failures, tally.cancelled, tally.pruned, tally.best) == (7, 5, 1, 1, None)
    assert tally.failures_text() == "failures 5 (CRASH 2, TIMEOUT 1, FAILED 1, …)"


def test_reasons_that_never_repeat_take_bounded_memory(ended: Ended) -> None:
    tally = Tally()
    for number in range(500):
        tally.add(ended(f"F_{number}"))
    assert tally.failures == 500
    assert len(tally.kinds) <= 101
    assert tally.kinds[OTHER_KINDS] == 400
