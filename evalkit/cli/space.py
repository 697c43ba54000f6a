"""Configurations that are generated, a grid or random draws: the same words give the same configurations."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from evalkit.cli.scalars import Scalar, parse_scalar, split_values
from evalkit.errors import ParametersError

__all__ = ["Grid", "Space"]

_SYNTAX = "NAME=LOW:HIGH, NAME=LOW:HIGH:log, NAME=LOW:HIGH:int or NAME=a,b,c"
_FLAGS = ("log", "int")

Draw = Callable[[random.Random], Any]


class Grid:
    """The cartesian product of values, the last name varying fastest.

    Args:
        specs: each ``NAME=V1,V2,…``.

    Raises:
        ParametersError: one of them is not written like that, or a name comes twice.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        self._axes: dict[str, list[Scalar]] = {}
        for spec in specs:
            name, text = _split("--grid", spec, "NAME=V1,V2,…", self._axes)
            self._axes[name] = _values("--grid", spec, text)

    def __len__(self) -> int:
        return math.prod(map(len, self._axes.values()))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self._axes.values()):
            yield dict(zip(self._axes, values, strict=True))


class Space:
    """What to draw configurations from.

    Args:
        specs: each ``NAME=LOW:HIGH`` (floats, evenly), ``NAME=LOW:HIGH:log`` (evenly in the logarithm),
            ``NAME=LOW:HIGH:int`` (both ends included), ``NAME=LOW:HIGH:int:log``, or ``NAME=a,b,c`` (one of these).

    Raises:
        ParametersError: one of them is not written like that, or a name comes twice.
    """

    def __init__(self, specs: Sequence[str]) -> None:
        self._draws: dict[str, Draw] = {}
        for spec in specs:
            name, text = _split("--space", spec, _SYNTAX, self._draws)
            self._draws[name] = _draw(spec, text)

    def sample(self, n: int, seed: int) -> Iterator[dict[str, Any]]:
        """``n`` configurations. The first ``m`` of them are those of ``sample(m, seed)``, on every machine."""
        rng = random.Random(seed)  # noqa: S311 - no secret is drawn here
        for _ in range(n):
            yield {name: draw(rng) for name, draw in self._draws.items()}


def _split(option: str, spec: str, syntax: str, known: dict[str, Any]) -> tuple[str, str]:
    name, separator, text = spec.partition("=")
    name = name.strip()
    if not separator or not name:
        raise ParametersError(f"{option} {spec!r}: write {syntax}")
    if name in known:
        raise ParametersError(f"{option} {spec!r}: {name!r} was given before; write all its values in one {option}")
    return name, text


def _values(option: str, spec: str, text: str) -> list[Scalar]:
    try:
        return [parse_scalar(value) for value in split_values(text)]
    except ValueError as exc:
        raise ParametersError(f"{option} {spec!r}: {exc}") from None


def _draw(spec: str, text: str) -> Draw:
    if '"' not in text and "," not in text and ":" in text:
        return _range(spec, text)
    values = _values("--space", spec, text)
    return lambda rng: values[rng.randrange(len(values))]


def _range(spec: str, text: str) -> Draw:
    first, second, *flags = text.split(":")
    low, high = _number(first), _number(second)
    if low is None or high is None or set(flags) - set(_FLAGS) or len(set(flags)) < len(flags):
        raise ParametersError(f"--space {spec!r}: write {_SYNTAX}")
    if not low <= high:
        raise ParametersError(f"--space {spec!r}: {first} is greater than {second}")
    if "log" in flags and not low > 0:
        raise ParametersError(f"--space {spec!r}: a logarithm needs a LOW above 0")
    if "int" not in flags:
        start, end = float(low), float(high)
        if not math.isfinite(end - start):
            raise ParametersError(f"--space {spec!r}: the range is wider than a float can be")
        return (lambda rng: _log_uniform(rng, start, end)) if "log" in flags else (lambda rng: rng.uniform(start, end))
    if low != int(low) or high != int(high):
        raise ParametersError(f"--space {spec!r}: the ends of a range of ints are ints")
    bottom, top = int(low), int(high)
    if "log" not in flags:
        return lambda rng: rng.randint(bottom, top)
    # Half a step beyond either end, so that the ends are as likely as their place in the logarithm says.
    return lambda rng: min(top, max(bottom, round(_log_uniform(rng, bottom - 0.5, top + 0.5))))


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))


def _number(text: str) -> int | float | None:
    value = parse_scalar(text)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an int that is larger than any float
        return None
