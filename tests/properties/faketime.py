"""Time that moves when a test says so, for everything in the engine that asks for it."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from evalkit import evaluator
from evalkit.engine import budget, drawing, endings, recorder, scheduler

__all__ = ["FakeTime", "fake_time"]


class FakeTime:
    """Stands for the module ``time`` and for the clocks of an evaluator. Its calls happen in :meth:`advance`.

    Attributes:
        before: called before each timed call, with the time at which it is due.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.before: list[Callable[[float], None]] = []
        self._order = itertools.count()
        self._due: list[tuple[float, int, _FakeClock, Callable[..., None], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def clock(self, name: str = "") -> _FakeClock:
        """What takes the place of the class ``Clock``."""
        return _FakeClock(self)

    @property
    def next_due(self) -> float:
        """When something happens by itself; infinite if nothing ever does."""
        self._drop_closed()
        return self._due[0][0] if self._due else math.inf

    def advance(self, seconds: float) -> None:
        """Let so much time pass, with all that is due in it, in order."""
        end = self.now + seconds
        while self.next_due <= end:
            due, _, _, function, args = heapq.heappop(self._due)
            self.now = max(self.now, due)
            for hook in self.before:
                hook(self.now)
            function(*args)
        self.now = max(self.now, end)

    def at(self, due: float, clock: _FakeClock, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        heapq.heappush(self._due, (due, next(self._order), clock, function, args))

    def _drop_closed(self) -> None:
        while self._due and self._due[0][2].closed:
            heapq.heappop(self._due)


class _FakeClock:
    def __init__(self, time: FakeTime) -> None:
        self._time = time
        self.closed = False

    def call_later(self, delay: float, function: Callable[..., None], *args: Any) -> None:
        if delay != math.inf and not self.closed:
            self._time.at(self._time.now + delay, self, function, args)

    judge_later = call_later  # no call is ever late

    def close(self) -> None:
        self.closed = True


@contextmanager
def fake_time() -> Iterator[FakeTime]:
    """Evaluators that are made in here live in fake time."""
    time = FakeTime()
    with ExitStack() as stack:
        for module in (evaluator, budget, drawing, endings, recorder, scheduler):
            stack.enter_context(patch.object(module, "time", time))
        stack.enter_context(patch.object(evaluator, "Clock", time.clock))
        yield time
