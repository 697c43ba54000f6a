"""Recorder: brings what happens to jobs into the storage, in batches, and never drops it."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evalkit.engine.clock import Clock
from evalkit.errors import StorageUnavailableError
from evalkit.interrupts import InterruptHeld, raised_by_handler
from evalkit.job import Job
from evalkit.storage.base import JobUpdate, Storage
from evalkit.storage.left_values import UnstorableValue
from evalkit.usercode import describe_error, shown, type_name

__all__ = ["Recorder"]

_log = logging.getLogger("evalkit")

_INTERVAL = 0.05  # seconds between writes nobody waits for; longer if one takes long
_SOON = 0.002  # seconds that an end may wait for others, to be written with them; longer if a write takes long
_SHARE = 10  # background writes take at most one tenth of the time
_SLICE = 1000  # jobs in one write
_PATIENCE = 10.0  # seconds for which a storage that is away is tried again
_FIRST_BACKOFF = 0.05  # seconds; doubles with each try
_LONGEST_BACKOFF = 5.0  # seconds between tries that nobody waits for
_MOST_LINES = 10  # in the log, of jobs that cannot be recorded; beyond these, of the 16th, the 32nd and so on


def _nothing() -> None:
    pass


def _warn(message: str, *args: object) -> None:
    """Log the exception at hand. That may fail itself: a job in this process may have closed the stream it goes to."""
    with contextlib.suppress(Exception):
        _log.warning(message, *args, exc_info=True)


class Recorder:
    """Collects the jobs that changed and writes each as it is by then: a job that ran through between two writes is one
    write.

    What was noted is written within :data:`_INTERVAL`, ends within :data:`_SOON`, or, for who calls :meth:`flush`, at
    once. What the storage does not take is kept for the next write. Ends do not take along what else has changed:
    most of that is over by the time at which it would be written.

    Attributes:
        durable: whether what is written outlives this process.
        away: whether the storage did not take the last write.
        on_written: called after each write, where the storage is durable: what waited for it may start.
    """

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock
        self.durable = storage.durable
        self.away = False
        self.on_written: Callable[[], None] = _nothing
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._changed: dict[str, Job] = {}
        self._ended: list[Job] = []  # each once
        self._being_written = 0  # of those that have ended
        self._scheduled: float | None = None  # when something is written in the background, on the monotonic clock
        self._changes_due = math.inf  # when that includes jobs which have changed, and not ended
        self._last_duration = 0.0
        self._backoff = 0.0  # of the writes in the background, while none succeeds
        self._patience = _PATIENCE
        self._refused = 0  # jobs that the storage did not take at all

    @property
    def unwritten(self) -> int:
        """How many jobs have ended and are not in the storage yet."""
        return len(self._ended) + self._being_written

    def note(self, changed: Sequence[Job], ended: Sequence[Job], at_once: bool = False) -> None:
        """These jobs have changed, and those have ended; cheap enough for every event. An end is noted once.

        Args:
            at_once: whether somebody waits for the ends to be written.
        """
        with self._lock:
            for job in changed:
                self._changed[job.id] = job
            self._ended += ended
            if self._changed:
                for job in ended:
                    self._changed.pop(job.id, None)
            if not (self._changed or (self._ended and self.durable)):
                return
            now = time.monotonic()
            pause = _SHARE * self._last_duration
            if self._changed and self._changes_due == math.inf:
                self._changes_due = now + max(_INTERVAL, pause)
            if not self.durable:
                return  # it is written when somebody gathers
            due = self._changes_due
            if self._ended:
                due = min(due, now if at_once else now + max(_SOON, pause))
            if self._backoff:
                due = now + self._backoff
            if self._scheduled is not None and self._scheduled <= due:
                return
            self._scheduled = due
        self._clock.call_later(max(0.0, due - now), self._write_in_background, due)

    def hurry(self) -> None:
        """Somebody waits for the ends that were noted to be written."""
        self.note((), (), at_once=True)

    def flush(self) -> None:
        """Write the ends that were noted, and return when they are durable.

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
                _warn("the storage is not available; trying again in %.2g s", delay)
                time.sleep(delay)
                delay *= 2
            else:
                return

    def _write_in_background(self, due: float) -> None:
        with self._lock:
            if self._scheduled != due:
                return  # another comes sooner, or has
            self._scheduled = None
        self.write()
        self.note((), ())

    def write(self) -> None:
        """Write what is due; what the storage does not take now is tried again later."""
        first = not self._backoff
        try:
            self._write()
        except StorageUnavailableError:
            if first:
                _warn("the storage is not available; results are kept")
            self.note((), ())

    def _write(self) -> None:
        with InterruptHeld():
            try:
                self._write_now()
            finally:
                if self.durable:
                    self.on_written()

    def _write_now(self) -> None:
        # One write at a time; a second one waits, so that what it was called for is written when it returns.
        with self._writing:
            with self._lock:
                changed: dict[str, Job] = {}
                if time.monotonic() >= self._changes_due:
                    changed, self._changed = self._changed, {}
                    self._changes_due = math.inf
                self._being_written = len(self._ended)  # first: who asks how many are unwritten takes no lock
                ended, self._ended = self._ended, []
            if not (ended or changed):
                return
            start = time.monotonic()
            written = 0
            try:
                self._write_changed(list(changed.values()))
                changed = {}
                while written < len(ended):
                    jobs = ended[written : written + _SLICE]
                    if _refusal(self._storage.end_jobs, jobs) is None:
                        written += len(jobs)
                        continue
                    for job in jobs:  # something is wrong with one of them, or with what it returned
                        self._write_alone(job, self._storage.end_jobs)
                        written += 1
            except BaseException as exc:
                with self._lock:
                    self.away = isinstance(exc, StorageUnavailableError)
                    self._changed = changed | self._changed
                    self._ended = ended[written:] + self._ended
                    self._being_written = 0
                    # Before anybody is told: who waits for the ends would have them written at once, and again.
                    self._backoff = min(max(2 * self._backoff, _FIRST_BACKOFF), _LONGEST_BACKOFF)
                raise
            self.away = False
            self._being_written = 0
            self._last_duration = time.monotonic() - start
            self._backoff = 0.0

    def _write_changed(self, jobs: list[Job]) -> None:
        # Who has ended since it was noted has its end noted as well, and a record takes only one.
        if jobs and _refusal(self._update, jobs) is not None:
            for job in jobs:
                self._write_alone(job, self._update)

    def _update(self, jobs: Sequence[Job]) -> None:
        updates = [update for update in map(JobUpdate.of, jobs) if not update.ends]
        if updates:
            self._storage.update_jobs(updates)

    def _write_alone(self, job: Job, write: Callable[[Sequence[Job]], None]) -> None:
        """Write one job; if the storage does not take it, without its values; if not even that, say so."""
        refusal = _refusal(write, [job])
        if refusal is None or _refusal(self._write_without_values, job, write, refusal) is None:
            return
        self._refused += 1
        # Of a storage that takes nothing, a search of a million jobs would say so a million times.
        if self._refused <= _MOST_LINES or self._refused.bit_count() == 1:
            with contextlib.suppress(Exception):
                _log.error("job %s cannot be recorded: %s", job.id, describe_error(refusal))

    def _write_without_values(self, job: Job, write: Callable[..., None], refusal: BaseException) -> None:
        reason = describe_error(refusal)

        def kept(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: _stand_in(value, reason) for name, value in values.items()}

        update = JobUpdate.of(job)
        if update.ends and write == self._update:
            return  # it has ended since, and its end is noted as well
        update.output = _stand_in(update.output, reason)
        update.metadata = None if update.metadata is None else kept(update.metadata)
        update.records = None if update.records is None else list(map(kept, update.records))
        self._storage.update_jobs([update])


def _refusal(write: Callable[..., None], *args: Any) -> BaseException | None:
    """Call a method of the storage; return what it raised, which of a stranger's storage may be anything.

    Raises:
        StorageUnavailableError: it may take the same later.
        BaseException: of a signal.
    """
    try:
        write(*args)
    except StorageUnavailableError:
        raise
    except BaseException as exc:
        if raised_by_handler(exc):
            raise
        return exc
    return None


def _stand_in(value: Any, reason: str) -> Any:
    """What is stored of a value, or of what is beside it, that the storage has refused."""
    if value is None or type(value) in (bool, float) or (type(value) is int and value.bit_length() < 64):
        return value
    return UnstorableValue(type_name(type(value)), shown(value), reason)
