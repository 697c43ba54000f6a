"""Where the configurations of a run come from: a file, a grid, random draws, or what a search has left over."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from evalkit.cli.params import STDIN, ParameterFile
from evalkit.cli.space import Grid, Space
from evalkit.errors import ParametersError

__all__ = ["Source", "new_seed", "source_of"]

Configurations = Iterator[dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Source:
    """A supply of configurations that can be drawn again.

    Attributes:
        label: what to call it.
        configurations: draws them; takes the seed, which only random draws look at.
        total: how many there are; None if nobody can know.
        identity: by which a resume knows that it is the same supply.
        is_random: whether a seed matters.
    """

    label: str
    configurations: Callable[[int], Configurations]
    total: int | None
    identity: dict[str, Any] = field(default_factory=dict)
    is_random: bool = False


def source_of(
    params: str | None, grid: Sequence[str], random: int | None, space: Sequence[str], seed: int | None
) -> Source | None:
    """What the options name; None if they name nothing. A file that can be read twice is checked.

    Raises:
        ParametersError: they contradict each other, or what they name is not well-formed.
    """
    given = [
        name
        for name, value in (("--params", params), ("--grid", grid), ("--random", random))
        if value is not None and value != [] and value != ()
    ]
    if len(given) > 1:
        raise ParametersError(f"{' and '.join(given)} each name the configurations to run: give one of them")
    if random is None and space:
        raise ParametersError("--space is what --random draws from: say how many with --random N")
    if random is None and seed is not None:
        raise ParametersError("--seed is for --random N: nothing else is drawn")
    if params is not None:
        file = ParameterFile(params)
        identity = STDIN if params == STDIN else os.path.abspath(params)
        return Source(file.name, lambda _: iter(file), file.check(), {"params": identity})
    if grid:
        product = Grid(grid)
        return Source(f"a grid of {len(product):,}", lambda _: iter(product), len(product), {"grid": list(grid)})
    if random is not None:
        if random < 1:
            raise ParametersError(f"--random takes how many to draw, at least 1, not {random}")
        if not space:
            raise ParametersError("--random needs to know what to draw: add --space NAME=LOW:HIGH or NAME=a,b,c")
        drawn, n = Space(space), random
        return Source(f"{n:,} random draws", lambda seed: drawn.sample(n, seed), n, {"space": list(space)}, True)
    return None


def new_seed() -> int:
    """A seed for those who gave none."""
    return secrets.randbits(32)
