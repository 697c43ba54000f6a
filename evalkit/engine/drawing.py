"""Drawer: draws a lazy iterable in chunks, and lets no job wait long for the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from evalkit.engine.arguments import parameters_of
from evalkit.engine.clock import Clock
from evalkit.job import Job

__all__ = ["Drawer", "chunks_of"]

_FIRST = 512  # jobs that go through submit at a time; twice as many each time, so that workers start early
_CHUNK = 4096  # at most
_WAIT = 0.02  # seconds that a job may wait for the next ones of a slow iterable


def chunks_of(copies: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The parameters of many jobs in the portions in which they are submitted."""
    start, size = 0, _FIRST
    while start < len(copies):
        yield copies[start : start + size]
        start += size
        size = min(2 * size, _CHUNK)


class Drawer:
    """One submit of a lazy iterable. No lock is held while the iterable produces: it may use the evaluator itself.

    Args:
        check: called with how many jobs wait to be admitted; raises if they cannot be.
        admit: creates the jobs and starts what can start.
        clock: where a chunk is admitted whose next job is long in coming; None leaves that to the next job.
    """

    def __init__(
        self,
        check: Callable[[int], None],
        admit: Callable[[list[dict[str, Any]]], list[Job]],
        clock: Clock | None,
    ) -> None:
        self._check = check
        self._admit = admit
        self._clock = clock
        self._lock = threading.Lock()
        self._chunk: list[dict[str, Any]] = []
        self._due = 0.0
        self._failure: BaseException | None = None
        self._jobs: list[Job] = []

    def draw(self, entries: Iterable[Any]) -> list[Job]:
        """Submit all of it. What it gave before it failed is submitted; what is refused, and all after it, is not."""
        try:
            for index, args in enumerate(entries):
                self._add(parameters_of(args, index))
        finally:
            with self._lock:
                if self._failure is None:
                    self._admit_chunk()
        if self._failure is not None:  # the clock met it, and nothing was drawn since
            raise self._failure
        return self._jobs

    def _add(self, args: dict[str, Any]) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._chunk.append(args)
            try:
                self._check(len(self._chunk))
            except BaseException as exc:
                self._failure = exc
                raise
            if len(self._chunk) == 1:
                self._due = time.monotonic() + _WAIT
                if self._clock is not None:
                    self._clock.call_later(_WAIT, self._admit_late, self._due)
            elif len(self._chunk) >= _CHUNK or time.monotonic() >= self._due:
                self._admit_chunk()

    def _admit_late(self, due: float) -> None:
        """The next job is long in coming."""
        with self._lock:
            if self._chunk and due == self._due and self._failure is None:
                try:
                    self._admit_chunk()
                except Exception:  # noqa: BLE001 - it is kept, for the thread that draws
                    return

    def _admit_chunk(self) -> None:
        chunk, self._chunk = self._chunk, []
        if chunk:
            try:
                self._jobs += self._admit(chunk)
            except BaseException as exc:
                self._failure = exc
                raise
