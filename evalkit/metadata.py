"""JobMetadata: where, when and at what cost a job ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["JobMetadata", "Measured", "MeasuredRuns", "WorkerIdentity"]

#: What was measured of a run: start and end (seconds since the Unix epoch), CPU time (seconds), peak memory (bytes).
Measured = tuple[float, float | None, float | None, int | None]


class MeasuredRuns(NamedTuple):
    """What was measured of many runs, by columns: a tuple and its numbers for each would take several times the memory.
    Who keeps one of the jobs keeps the columns, 32 bytes for each of the others.
    """

    starts: Sequence[float]
    ends: Sequence[float]
    cpu_times: Sequence[float]
    peaks: Sequence[int]

    def of(self, row: int) -> Measured:
        """What was measured of one of them."""
        return self.starts[row], self.ends[row], self.cpu_times[row], self.peaks[row]


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who ran a job.

    Attributes:
        host: its machine.
        pid: its process.
        name: its name in the backend, such as ``process-3``.
    """

    host: str
    pid: int
    name: str


class JobMetadata(Mapping[str, Any]):
    """Where, when and at what cost a job ran; a compact mapping that shows only what is known.

    Timestamps are seconds since the evaluator was created, ``duration`` and ``cpu_time`` are seconds, ``peak_rss`` is
    bytes. The CPU time of a run of less than 50 µs is its duration, since asking for it may take as long. ``ran_by`` is
    who ran it, and ``extra`` what else there is: what the run function returned under ``"metadata"``, and ``resources``
    and ``attempts``, where a job had some.
    """

    __slots__ = (
        "attempt",
        "cpu_time",
        "extra",
        "peak_rss",
        "ran_by",
        "timestamp_end",
        "timestamp_gather",
        "timestamp_start",
        "timestamp_submit",
    )

    KEYS = (
        "timestamp_submit",
        "timestamp_start",
        "timestamp_end",
        "timestamp_gather",
        "host",
        "pid",
        "worker",
        "attempt",
        "duration",
        "cpu_time",
        "peak_rss",
    )

    def __init__(
        self,
        timestamp_submit: float,
        timestamp_start: float | None = None,
        timestamp_end: float | None = None,
        timestamp_gather: float | None = None,
        ran_by: WorkerIdentity | None = None,
        attempt: int = 0,
        cpu_time: float | None = None,
        peak_rss: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.timestamp_submit = timestamp_submit
        self.timestamp_start = timestamp_start
        self.timestamp_end = timestamp_end
        self.timestamp_gather = timestamp_gather
        self.ran_by = ran_by
        self.attempt = attempt
        self.cpu_time = cpu_time
        self.peak_rss = peak_rss
        self.extra = extra

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JobMetadata:
        """The inverse of ``dict(metadata)``."""
        rest = dict(values)
        rest.pop("duration", None)
        known = {key: rest.pop(key) for key in cls.KEYS if key in cls.__slots__ and key in rest}
        known.setdefault("timestamp_submit", 0.0)
        if {"host", "pid", "worker"} <= rest.keys():
            known["ran_by"] = WorkerIdentity(rest.pop("host"), rest.pop("pid"), rest.pop("worker"))
        return cls(**known, extra=rest or None)

    @property
    def host(self) -> str | None:
        """The machine it ran on."""
        return None if self.ran_by is None else self.ran_by.host

    @property
    def pid(self) -> int | None:
        """The process it ran in."""
        return None if self.ran_by is None else self.ran_by.pid

    @property
    def worker(self) -> str | None:
        """The name of the worker that ran it, such as ``process-3``."""
        return None if self.ran_by is None else self.ran_by.name

    @property
    def duration(self) -> float | None:
        """Seconds from start to end."""
        if self.timestamp_start is None or self.timestamp_end is None:
            return None
        return self.timestamp_end - self.timestamp_start

    def __getitem__(self, key: str) -> Any:
        if self.extra is not None and key in self.extra:
            return self.extra[key]
        value = getattr(self, key) if key in self.KEYS else None
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        extra = self.extra or {}
        for key in self.KEYS:
            if key not in extra and getattr(self, key) is not None:
                yield key
        yield from extra

    def __len__(self) -> int:
        return sum(1 for _ in self)
