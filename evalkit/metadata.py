"""JobMetadata: where, when and at what cost a job ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["JobMetadata"]


class JobMetadata(Mapping[str, Any]):
    """Where, when and at what cost a job ran; a compact mapping that shows only what is known.

    Timestamps are seconds since the evaluator was created, ``duration`` and ``cpu_time`` are seconds, ``peak_rss`` is
    bytes. ``extra`` holds what the run function returned under ``"metadata"``.
    """

    __slots__ = (
        "attempt",
        "cpu_time",
        "extra",
        "host",
        "peak_rss",
        "pid",
        "timestamp_end",
        "timestamp_gather",
        "timestamp_start",
        "timestamp_submit",
        "worker",
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

    def __init__(self, timestamp_submit: float) -> None:
        self.timestamp_submit = timestamp_submit
        self.timestamp_start: float | None = None
        self.timestamp_end: float | None = None
        self.timestamp_gather: float | None = None
        self.host: str | None = None
        self.pid: int | None = None
        self.worker: str | None = None
        self.attempt = 0
        self.cpu_time: float | None = None
        self.peak_rss: int | None = None
        self.extra: dict[str, Any] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JobMetadata:
        """The inverse of ``dict(metadata)``."""
        metadata = cls(values.get("timestamp_submit", 0.0))
        for key, value in values.items():
            if key in cls.__slots__ and key != "extra":
                setattr(metadata, key, value)
            elif key != "duration":
                metadata.extra = (metadata.extra or {}) | {key: value}
        return metadata

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
