"""Objectives: what an output says of how well it went."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from evalkit.usercode import attempt, entry_of

__all__ = ["is_failed_objective", "objective_of"]


def objective_of(output: Any) -> Any:
    """Read the objective out of what a run function returned, whatever its methods raise.

    Returns:
        a number as it is; a tuple or list of numbers as a tuple; a string ``"F_…"`` as it is (a failed evaluation that
        the user reported); for a mapping, what stands under ``"objective"``; None for anything else.
    """
    if type(output) is dict:
        return _read(entry_of(output, "objective"), _number_of)
    return _read(output, _objective_of)


def _read(value: Any, read: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if value is None or kind is float or kind is int:
        return value
    if kind is str:
        return value if value.startswith("F_") else None
    return attempt(read, value)[0]


def _objective_of(output: Any) -> Any:
    return _number_of(output.get("objective") if isinstance(output, Mapping) else output)


def _number_of(output: Any) -> Any:
    if isinstance(output, str):
        text = str.__str__(output)  # not what a subclass makes of it
        return text if text.startswith("F_") else None
    if isinstance(output, numbers.Number):
        return output
    if isinstance(output, tuple | list) and output and all(isinstance(one, numbers.Number) for one in output):
        return tuple(output)
    return None


def is_failed_objective(objective: Any) -> bool:
    """Whether an objective says that the evaluation failed: ``"F_…"``, NaN or ±inf, alone or among several."""
    kind = type(objective)
    if kind is float:
        return not math.isfinite(objective)
    if kind is str:
        return bool(objective.startswith("F_"))
    return not (objective is None or kind is int) and attempt(_is_failed, objective)[0] is True


def _is_failed(objective: Any) -> bool:
    if isinstance(objective, str):
        return objective.startswith("F_")
    if isinstance(objective, tuple):
        return any(is_failed_objective(one) for one in objective)
    # Compared, not converted: an int may be larger than any float.
    return isinstance(objective, numbers.Real) and bool(objective != objective or abs(objective) == math.inf)
