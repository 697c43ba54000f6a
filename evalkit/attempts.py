"""Attempt: one run of a job that was followed by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from evalkit.metadata import WorkerIdentity
from evalkit.states import ErrorInfo, JobCause

__all__ = ["Attempt"]

_MAX_MESSAGE = 500  # characters; a record holds a job's attempts as often as it is written


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one run of a job went that was not its last.

    Attributes:
        attempt: 0 for the first run.
        cause: why it did not count: the kind of failure; LOST where the machine went away.
        error: the type of the error, such as ``ValueError`` or ``WorkerDied``.
        message: what it said, cut after 500 characters.
        host, pid, worker: who ran it; None if nobody told.
        timestamp_start: seconds since the evaluator was created.
        duration: seconds from its start to its end, or to when that became known.
        resources: what it had to itself.
    """

    attempt: int
    cause: JobCause
    error: str
    message: str
    host: str | None = None
    pid: int | None = None
    worker: str | None = None
    timestamp_start: float | None = None
    duration: float | None = None
    resources: dict[str, str] | None = None

    @classmethod
    def ended(
        cls,
        attempt: int,
        cause: JobCause,
        error: ErrorInfo,
        ran_by: WorkerIdentity | None,
        start: float | None,
        end: float | None,
        resources: Mapping[str, str],
    ) -> Self:
        """A run that ended by ``error``. The times are seconds since the evaluator was created."""
        message = error.message if len(error.message) <= _MAX_MESSAGE else error.message[: _MAX_MESSAGE - 1] + "…"
        duration = None if start is None or end is None else max(0.0, end - start)
        host, pid, worker = (None, None, None) if ran_by is None else (ran_by.host, ran_by.pid, ran_by.name)
        return cls(attempt, cause, error.type, message, host, pid, worker, start, duration, dict(resources) or None)

    def to_json(self) -> dict[str, Any]:
        """What is known of it, as JSON can hold it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None} | {"cause": self.cause.value}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`; what later versions may have added is left out."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**known | {"cause": JobCause(known["cause"])})
