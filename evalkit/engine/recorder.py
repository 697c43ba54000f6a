"""Recorder: brings what happens to jobs into the storage, in batches, and never drops it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from evalkit.engine.clock import Clock
from evalkit.errors import StorageError, StorageUnavailableError
from evalkit.job import TERMINAL_STATES, Job
from evalkit.storage.base import JobUpdate, Storage

__all__ = ["Recorder"]

_log = logging.getLogger("evalkit")

_INTERVAL = 0.05  # seconds between writes nobody waits for; longer if one takes long
_SHARE = 10  # background writes take at most one tenth of the time
_SLICE = 1000  # jobs in one write
_PATIENCE = 10.0  # seconds for which a storage that is away is tried again
_FIRST_BACKOFF = 0.05  # seconds; doubles with each try


class Recorder:
    """Collects the jobs that changed and writes each as it is by then: a job that ran through between two writes is one
    write.

    What was noted is written within :data:`_INTERVAL` or, for who calls :meth:`flush`, at once. What the storage does
    not take is kept for the next write.
    """

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._dirty: dict[str, tuple[Job, bool]] = {}  # and whether it had ended when it was noted
        self._scheduled = False
        self._last_duration = 0.0
        self._patience = _PATIENCE

    def note(self, jobs: Iterable[Job]) -> None:
        """These jobs have changed; cheap enough for every event. The end of a job is noted once, after it came."""
        with self._lock:
            for job in jobs:
                self._dirty[job.id] = (job, job.is_complete)
            if self._scheduled or not self._storage.durable or not self._dirty:
                return
            self._scheduled = True
        self._clock.call_later(max(_INTERVAL, _SHARE * self._last_duration), self._write_in_background)

    def flush(self) -> None:
        """Write what was noted, and return when it is durable.

        Raises:
            StorageUnavailableError: the storage has been away for too long; what was noted is kept.
        """
        delay = _FIRST_BACKOFF
        deadline: float | None = None
        while True:
            try:
                self._write()
            except StorageUnavailableError:
                if deadline is None:
                    deadline = time.monotonic() + self._patience
                if time.monotonic() + delay > deadline:
                    raise
                _log.warning("the storage is not available; trying again in %.2g s", delay, exc_info=True)
                time.sleep(delay)
                delay *= 2
            else:
                return

    def _write_in_background(self) -> None:
        with self._lock:
            self._scheduled = False
        try:
            self._write()
        except StorageUnavailableError:
            _log.warning("the storage is not available; results are kept", exc_info=True)
            self.note(())

    def _write(self) -> None:
        # One write at a time; a second one waits, so that what it was called for is written when it returns.
        with self._writing:
            with self._lock:
                dirty, self._dirty = self._dirty, {}
            if not dirty:
                return
            start = time.monotonic()
            try:
                noted = list(dirty.values())
                for first in range(0, len(noted), _SLICE):
                    part = noted[first : first + _SLICE]
                    updates = [update for job, ended in part if (update := _update(job, ended)) is not None]
                    if updates:
                        self._write_some(updates)
                    for job, _ in part:
                        del dirty[job.id]
            except BaseException:
                with self._lock:
                    self._dirty = dirty | self._dirty
                raise
            self._last_duration = time.monotonic() - start

    def _write_some(self, updates: list[JobUpdate]) -> None:
        try:
            self._storage.update_jobs(updates)
        except StorageUnavailableError:
            raise
        except StorageError:
            # Something is wrong with one of them (its search was deleted, say): the others go in without it.
            self._write_one_by_one(updates)

    def _write_one_by_one(self, updates: list[JobUpdate]) -> None:
        for update in updates:
            try:
                self._storage.update_jobs([update])
            except StorageUnavailableError:
                raise
            except StorageError as exc:
                _log.error("job %s cannot be recorded: %s", update.id, exc)


def _update(job: Job, ended: bool) -> JobUpdate | None:
    """All of a job as it is now. The state is read first: once it is terminal, all the rest is final.

    None if it has ended since it was noted: its end is about to be noted as well, and a record takes only one end.
    """
    state = job.state
    if not ended and state in TERMINAL_STATES:
        return None
    records, captured = job.records, job.captured
    return JobUpdate(
        job.id,
        state,
        job.output,
        job.error,
        job.cause,
        job.measured,
        records or None,
        job.attempt,
        log=None if captured is None or not ended else str(captured),
    )
