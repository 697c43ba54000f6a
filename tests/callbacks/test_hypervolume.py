from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.callbacks.hypervolume import front_of, hypervolume


def by_inclusion_exclusion(points: list[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    boxes = [tuple(max(0.0, value - low) for value, low in zip(point, reference, strict=True)) for point in points]
    return sum(
        (-1) ** (size + 1) * math.prod(map(min, *some) if size > 1 else some[0])
        for size in range(1, len(boxes) + 1)
        for some in itertools.combinations(boxes, size)
    )


# A coarse grid, so that equal points, ties in one objective and points below the reference are frequent.
coordinate = st.integers(-1, 6).map(float)


@st.composite
def point_sets(draw: st.DrawFn) -> tuple[list[tuple[float, ...]], tuple[float, ...]]:
    dimension = draw(st.integers(1, 6))
    point = st.tuples(*[coordinate] * dimension)
    return draw(st.lists(point, max_size=7)), draw(st.tuples(*[st.integers(0, 1).map(float)] * dimension))


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([], (0.0, 0.0), 0.0),
        ([(3.0,), (5.0,)], (1.0,), 4.0),
        ([(2.0, 3.0)], (0.0, 0.0), 6.0),
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], (0.0, 0.0), 6.0),
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (1.0, 1.0), (2.0, 2.0)], (0.0, 0.0), 6.0),
        ([(1.0, 3.0), (3.0, 1.0)], (1.0, 1.0), 0.0),
        ([(1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (2.0, 3.0, 1.0)], (0.0, 0.0, 0.0), 12.0),
        ([(-1.0, -3.0), (-2.0, -2.0)], (-4.0, -4.0), 5.0),
        ([(1.0, 1.0, 1.0, 2.0), (1.0, 1.0, 2.0, 1.0)], (0.0,) * 4, 3.0),
        ([tuple(2.0 if i == j else 1.0 for j in range(5)) for i in range(5)], (0.0,) * 5, 6.0),
    ],
)
def test_known_volumes(points: list[tuple[float, ...]], reference: tuple[float, ...], volume: float) -> None:
    assert hypervolume(points, reference) == pytest.approx(volume, abs=1e-12)


@given(point_sets())
def test_volume_is_that_of_inclusion_and_exclusion(case: tuple[list[tuple[float, ...]], tuple[float, ...]]) -> None:
    points, reference = case
    assert hypervolume(points, reference) == by_inclusion_exclusion(points, reference)


@given(point_sets())
def test_growths_add_up_to_the_volume_in_any_order(case: tuple[list[tuple[float, ...]], tuple[float, ...]]) -> None:
    points, reference = case
    for order in (points, points[::-1], sorted(points)):
        front = front_of(len(reference))
        total = 0.0
        for point in order:
            total += front.growth(point, reference)
            front.add(point)
        assert total == by_inclusion_exclusion(points, reference)


@given(point_sets())
def test_the_front_holds_what_nothing_dominates_once(case: tuple[list[tuple[float, ...]], tuple[float, ...]]) -> None:
    points, reference = case
    front = front_of(len(reference))
    entered = [front.add(point) for point in points]

    def dominated(point: tuple[float, ...]) -> bool:
        return any(other != point and all(map(float.__ge__, other, point)) for other in points)

    assert sorted(front) == sorted({point for point in points if not dominated(point)})
    assert len(front) == len(list(front))
    assert entered == [
        not any(all(map(float.__ge__, other, point)) for other in points[:index]) for index, point in enumerate(points)
    ]


def test_a_point_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 values and the point \(1.0,\) has 1"):
        hypervolume([(1.0,)], (0.0, 0.0))
    with pytest.raises(ValueError, match="at least one value"):
        hypervolume([], ())
