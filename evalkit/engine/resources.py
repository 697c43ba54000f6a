"""Resources: what running jobs have to themselves, such as a GPU each."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evalkit.job import Job

__all__ = ["LeasedTask", "Resources", "check_resources"]

_log = logging.getLogger("evalkit")


def check_resources(resources: Any) -> dict[str, tuple[str, ...]]:
    """The units of each kind, as text; ``{}`` for None.

    Raises:
        ValueError: it is no mapping of names to lists of units, a list is empty, or a unit is in it twice.
    """
    if resources is None:
        return {}
    if not isinstance(resources, Mapping):
        raise ValueError(f'resources takes a mapping such as {{"gpu": ["0", "1"]}}, not {resources!r}')  # noqa: TRY004 - one kind of error, whatever is wrong
    return {_check_kind(kind): _check_units(kind, units) for kind, units in resources.items()}


def _check_kind(kind: Any) -> str:
    if not isinstance(kind, str) or not kind:
        raise ValueError(f'the kinds of resources are names such as "gpu", not {kind!r}')
    return kind


def _check_units(kind: str, units: Any) -> tuple[str, ...]:
    if isinstance(units, str | bytes) or not isinstance(units, Sequence):
        hint = f"; write {[part.strip() for part in units.split(',')]}" if isinstance(units, str) and units else ""
        raise ValueError(f"resources[{kind!r}] takes a list of units such as ['0', '1'], not {units!r}{hint}")  # noqa: TRY004
    if not units:
        raise ValueError(f"resources[{kind!r}] is empty, so no job could ever run; leave it out if jobs need none")
    names = []
    for unit in units:
        if isinstance(unit, bool) or not isinstance(unit, str | int) or unit == "":
            raise ValueError(f"the units of resources[{kind!r}] are strings or ints, not {unit!r}")
        names.append(str(unit))
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"resources[{kind!r}] names {', '.join(sorted(twice))} more than once; each unit is one")
    return tuple(names)


@dataclass(frozen=True, slots=True)
class LeasedTask:
    """One run of a job with its resources, for the backend: :class:`evalkit.backends.base.Task`.

    The job itself may be on its next attempt, with other resources, while a backend still has to do with this one.
    """

    id: str
    args: dict[str, Any]
    attempt: int
    resources: dict[str, str]


class Resources:
    """The units of one evaluator, put together to shares: one unit of each kind, for one job at a time.

    There are as many shares as there are units of the scarcest kind. The first that is free is given out, so that
    with fewer jobs at once than shares the last ones are never used. Called with the scheduler's lock held.

    Args:
        units: as :func:`check_resources` returns them; at least one kind.
    """

    def __init__(self, units: Mapping[str, Sequence[str]]) -> None:
        self._shares = [dict(zip(units, share, strict=True)) for share in zip(*units.values(), strict=False)]
        self._free = list(range(len(self._shares)))  # a heap
        self._held: dict[str, int] = {}  # job -> share
        self._abandoned: dict[tuple[str, int], int] = {}  # job, attempt -> share
        self._said_stuck = False

    @property
    def free(self) -> int:
        """How many more jobs can run."""
        return len(self._free)

    def lease(self, job: Job) -> LeasedTask:
        """Give a share to a job, and return what to hand to the backend. Its record and its run get the same."""
        share = self._held[job.id] = heapq.heappop(self._free)
        units = self._shares[share]
        job.lease(units.copy())
        return LeasedTask(job.id, job.args, job.attempt, units.copy())

    def give_back(self, job: Job, abandoned: bool) -> None:
        """The run of this job is over. One that was abandoned keeps its share until :meth:`release`."""
        share = self._held.pop(job.id)
        if abandoned:
            self._abandoned[job.id, job.attempt] = share
        else:
            heapq.heappush(self._free, share)

    def release(self, job_id: str, attempt: int) -> None:
        """A run that was abandoned has returned."""
        share = self._abandoned.pop((job_id, attempt), None)
        if share is not None:
            heapq.heappush(self._free, share)
            self._said_stuck = False

    def warn_if_stuck(self) -> None:
        """Say once that nothing can run, since all shares are with runs that were abandoned. To be called without the
        lock.
        """
        if len(self._abandoned) == len(self._shares) and not self._said_stuck:
            self._said_stuck = True
            jobs = ", ".join(sorted({job_id for job_id, _ in self._abandoned}))
            _log.warning(
                "jobs wait for resources, all of which are held by runs that were abandoned and have not returned: %s; "
                "method='process' ends such runs for real",
                jobs,
            )
