"""The thread backend: what its threads do beside one another."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from evalkit import Evaluator
from evalkit.testing.backend_fixtures import BOUND, in_background
from evalkit.testing.functions import echo


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_no_end_waits_for_the_next_job() -> None:
    """A thread that goes for the next job, and finds that another has taken it, has told of the last one before."""
    with Evaluator.create(echo, "thread", {"num_workers": 4}) as evaluator:
        for _ in range(1000):
            jobs = evaluator.submit([{}] * 20)
            assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
