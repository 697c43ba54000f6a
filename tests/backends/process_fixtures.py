"""What the tests of the process backend share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from evalkit import Evaluator
from evalkit.testing.backend_fixtures import BOUND, in_background
from evalkit.testing.processes import runs

__all__ = ["FakeTask", "Make", "alive", "gather"]

#: The fixture ``make``: an evaluator on process, which is closed when the test ends.
Make = Callable[..., Evaluator]


def gather(evaluator: Evaluator, kind: Any = "ALL", size: int = 1) -> Any:
    """``gather`` that fails instead of hanging."""
    return in_background(evaluator.gather, kind, size).result(BOUND)


def alive(pids: Iterable[int]) -> list[int]:
    """Those of these processes that have not ended."""
    return [pid for pid in pids if runs(pid)]


class FakeTask:
    """What a link sends of a task."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.args: dict[str, Any] = {}
        self.attempt = 0
