from __future__ import annotations

import pytest

from evalkit.cli.space import Grid, Space
from evalkit.errors import ParametersError


def test_a_grid_is_the_product_and_the_last_name_varies_fastest() -> None:
    grid = Grid(["x=1,2", "y=a,true"])
    assert len(grid) == 4
    expected = [{"x": 1, "y": "a"}, {"x": 1, "y": True}, {"x": 2, "y": "a"}, {"x": 2, "y": True}]
    assert list(grid) == expected


def test_a_seed_gives_the_same_draws_and_fewer_are_the_first_of_more() -> None:
    space = Space(["x=0:1", "lr=1e-5:1e-1:log", "n=1:3:int", "m=1:1000:int:log", "kind=a,b,none"])
    draws = list(space.sample(300, 7))
    assert draws == list(space.sample(300, 7))
    assert draws[:10] == list(space.sample(10, 7))
    assert draws != list(space.sample(300, 8))
    assert all(0 <= draw["x"] <= 1 and 1e-5 <= draw["lr"] <= 1e-1 for draw in draws)
    assert {draw["n"] for draw in draws} == {1, 2, 3}
    assert {draw["kind"] for draw in draws} == {"a", "b", None}
    assert all(isinstance(draw["m"], int) and 1 <= draw["m"] <= 1000 for draw in draws)
    # Evenly in the logarithm: as many below 1e-3 as above.
    assert 100 < sum(draw["lr"] < 1e-3 for draw in draws) < 200


def test_the_draws_are_those_of_every_version() -> None:
    """A resume years later has to draw the same: this guards the sequence."""
    (first,) = Space(["x=0:1", "n=1:100:int"]).sample(1, 1)
    assert first == {"x": 0.13436424411240122, "n": 98}


@pytest.mark.parametrize("spec", ["x", "=1", "x=", "x=1,,2", 'x="a'])
def test_a_malformed_grid_is_refused(spec: str) -> None:
    with pytest.raises(ParametersError, match="--grid"):
        Grid([spec])


@pytest.mark.parametrize(
    "spec", ["x", "x=", "x=1:", "x=a:b", "x=2:1", "x=0:1:log", "x=0:1:lag", "x=0:0.5:int", "x=0:1:int:int", "x=0:inf"]
)
def test_a_malformed_space_is_refused(spec: str) -> None:
    with pytest.raises(ParametersError, match="--space"):
        Space([spec])


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ParametersError, match="given before"):
        Grid(["x=1", "x=2"])
