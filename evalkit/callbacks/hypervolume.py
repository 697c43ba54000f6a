"""Pareto fronts and their hypervolume, exact, for objectives that are maximised.

The hypervolume of a set of points is the volume of the space that they dominate, down to a reference point: the
measure of "the size of the space covered" of Zitzler and Thiele, *Multiobjective optimization using evolutionary
algorithms: a comparative case study*, PPSN V, 1998. Two objectives are swept in order; three are swept with a planar
front that grows as the third falls (Fonseca, Paquete, López-Ibáñez, *An improved dimension-sweep algorithm for the
hypervolume indicator*, CEC 2006); more are reduced by exclusive volumes and limited sets, the WFG algorithm of While,
Bradstreet and Barone, *A fast way of calculating exact hypervolumes*, IEEE Transactions on Evolutionary Computation
16(1), 2012, with one objective less at each level. To minimise, negate points and reference.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["ParetoFront", "PlanarFront", "front_of", "hypervolume"]

Point = tuple[float, ...]


class ParetoFront:
    """The points that no other point dominates; equal points are kept once.

    One more point costs a look at the front, never at what was dropped from it.
    """

    def __init__(self) -> None:
        self._points: list[Point] = []

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points)

    def add(self, point: Point) -> bool:
        """Take a point in and drop what it dominates; False if one at least as good everywhere was there."""
        if any(_covers(other, point) for other in self._points):
            return False
        self._points = [other for other in self._points if not _covers(point, other)]
        self._points.append(point)
        return True

    def growth(self, point: Point, reference: Sequence[float]) -> float:
        """By how much the hypervolume over ``reference`` would grow if ``point`` were added; 0.0 or more."""
        box = tuple(value - low for value, low in zip(point, reference, strict=True))
        if min(box) <= 0.0:
            return 0.0
        limited = []
        for other in self._points:
            corner = tuple(min(value - low, side) for value, low, side in zip(other, reference, box, strict=True))
            if min(corner) > 0.0:
                limited.append(corner)
        return max(0.0, math.prod(box) - _volume(limited, len(box)))


class PlanarFront(ParetoFront):
    """A front of two objectives, in order, so that a place in it is found by bisection."""

    def __init__(self) -> None:
        super().__init__()
        # The first objective rises along the front while the second falls.
        self._first: list[float] = []
        self._second: list[float] = []

    def __len__(self) -> int:
        return len(self._first)

    def __iter__(self) -> Iterator[Point]:
        return iter(zip(self._first, self._second, strict=True))

    def add(self, point: Point) -> bool:
        first, second = point
        dominated = self._dominated(first, second)
        if dominated is None:
            return False
        start, end = dominated
        self._first[start:end] = [first]
        self._second[start:end] = [second]
        return True

    def growth(self, point: Point, reference: Sequence[float]) -> float:
        first, second = point
        left, floor = reference
        if first <= left or second <= floor:
            return 0.0
        dominated = self._dominated(first, second)
        if dominated is None:
            return 0.0
        start, end = dominated
        if start > 0:
            left = max(left, self._first[start - 1])
        area = 0.0
        for right, top in zip(self._first[start:end], self._second[start:end], strict=True):
            if right > left:
                area += (right - left) * (second - max(floor, top))
                left = right
        if first > left:
            top = max(floor, self._second[end]) if end < len(self._second) else floor
            area += (first - left) * (second - top)
        return area

    def _dominated(self, first: float, second: float) -> tuple[int, int] | None:
        """The slice of the front that a point would replace; None if the front covers the point."""
        end = bisect_left(self._first, first)
        if end < len(self._first) and self._second[end] >= second:
            return None
        start = end
        while start > 0 and self._second[start - 1] <= second:
            start -= 1
        if end < len(self._first) and self._first[end] == first:
            end += 1
        return start, end


def front_of(dimension: int) -> ParetoFront:
    """An empty front for points of ``dimension`` objectives."""
    return PlanarFront() if dimension == 2 else ParetoFront()


def hypervolume(points: Iterable[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume that ``points`` dominate above ``reference``.

    Args:
        points: of as many finite values each as the reference, in any order, dominated ones and equals included;
            every value is better the greater it is. A point that is not above the reference in every objective adds
            nothing.
        reference: the corner from which the volume is measured.

    Returns:
        the volume, in the product of the units of the objectives; 0.0 without points.

    Raises:
        ValueError: a point is of another length than the reference, or the reference is empty.
    """
    if not reference:
        raise ValueError("the reference point of a hypervolume needs at least one value, got none")
    boxes = []
    for point in points:
        if len(point) != len(reference):
            raise ValueError(
                f"the reference point has {len(reference)} values and the point {point!r} has {len(point)}"
            )
        box = tuple(value - low for value, low in zip(point, reference, strict=True))
        if min(box) > 0.0:
            boxes.append(box)
    return _volume(boxes, len(reference))


def _covers(one: Point, other: Point) -> bool:
    """Whether ``one`` is at least as good in every objective."""
    # A loop takes a third of the time of all() over a generator, and this is where the time goes.
    for mine, its in zip(one, other, strict=True):  # noqa: SIM110
        if mine < its:
            return False
    return True


def _non_dominated(points: list[Point]) -> list[Point]:
    # From the greatest down, so that no point is dominated by a later one.
    kept: list[Point] = []
    for point in sorted(points, reverse=True):
        if not any(_covers(other, point) for other in kept):
            kept.append(point)
    return kept


def _volume(points: list[Point], dimension: int) -> float:
    """The volume over the origin of points of which every value is positive."""
    if not points:
        return 0.0
    if dimension == 1:
        return max(point[0] for point in points)
    if len(points) == 1:
        return math.prod(points[0])
    if dimension == 2:
        return _area(points)
    if dimension == 3:
        return _sweep(points)
    volume = 0.0
    front = sorted(_non_dominated(points), key=lambda point: point[-1])
    for index, point in enumerate(front):
        # What follows is at least as high in the last objective, so limited by this point it is a prism of its
        # height: the exclusive volume needs one dimension less.
        base = point[:-1]
        limited = [tuple(map(min, base, other)) for other in front[index + 1 :]]
        volume += point[-1] * (math.prod(base) - _volume(limited, dimension - 1))
    return volume


def _area(points: list[Point]) -> float:
    area = top = 0.0
    for first, second in sorted(points, reverse=True):
        if second > top:
            area += first * (second - top)
            top = second
    return area


def _sweep(points: list[Point]) -> float:
    volume = area = 0.0
    above = math.inf
    slices = PlanarFront()
    for first, second, third in sorted(points, key=lambda point: point[2], reverse=True):
        if area:
            volume += area * (above - third)
        area += slices.growth((first, second), (0.0, 0.0))
        slices.add((first, second))
        above = third
    return volume + area * above
