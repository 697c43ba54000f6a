"""How many examples the property tests try: few and always the same ones, unless more are asked for."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["bounded", "seeds"]

#: ``EVALKIT_EXAMPLES=50 pytest tests/properties`` tries fifty times as many examples, and others each time.
_TIMES = int(os.environ.get("EVALKIT_EXAMPLES", "1"))


def bounded(examples: int, **more: Any) -> settings:
    """The settings of a property that is tried on so many examples."""
    return settings(
        max_examples=examples * _TIMES,
        derandomize=_TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        **more,
    )


def seeds(n: int) -> range:
    """Seeds for tests with real threads, where the same example may end in another way the next time."""
    return range(n * _TIMES)
