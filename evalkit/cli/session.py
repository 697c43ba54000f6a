"""A run of the shell as it is kept with its search, and what a resume finds there.

A search that the shell runs has a value ``cli.run`` (:class:`RunInfo`). What is *done* is what ended as DONE, FAILED or
PRUNED. What was cancelled, queued or running when the run ended is not done: a resume runs it again, as a new job, and
notes the old job as superseded, so that what is left is one record for each configuration.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from evalkit.cli.records import SUPERSEDED, config_key, has_failed, is_settled, iterate, job_of, superseded
from evalkit.errors import ParametersError, SearchNotFoundError, StorageError, VersionConflictError
from evalkit.job import Job, JobState
from evalkit.plugins import close_match
from evalkit.storage.base import JobRecord, JobUpdate, SearchRecord, Storage

__all__ = ["Backlog", "RunInfo", "check_seed", "find_search", "hint_at"]

_KEY = "cli.run"
_BATCH = 1024


@dataclass
class RunInfo:
    """What is kept of a run with its search, for a resume and for ``evalkit show``.

    Attributes:
        target: as it was given.
        source: where the configurations come from, such as ``{"params": "/data/a.csv"}``.
        seed: of ``--random``.
        minimize: whether smaller objectives are better.
        exhausted: whether every configuration of the source was submitted.
        ended: seconds since the Unix epoch at which it ended in good order; None as long as it has not.
        host, pid, process_started: the process that runs it.
    """

    target: str
    source: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    minimize: bool = False
    exhausted: bool = False
    ended: float | None = None
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    process_started: float = field(default_factory=lambda: psutil.Process().create_time())

    @classmethod
    def of(cls, search: SearchRecord) -> RunInfo | None:
        """What the last run left; None if the shell has not run this search."""
        values = search.values.get(_KEY)
        if not isinstance(values, Mapping) or "target" not in values:
            return None
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    def save(self, storage: Storage, search_id: str) -> None:
        storage.set_value(search_id, _KEY, asdict(self))

    def end(self, storage: Storage, search_id: str) -> None:
        self.ended = time.time()
        self.save(storage, search_id)

    def check_not_running(self, search_id: str) -> None:
        """Raise ``StorageError`` if the process that runs it is alive on this machine."""
        if self.ended is not None or self.host != platform.node() or self.pid == os.getpid():
            return
        try:
            alive = abs(psutil.Process(self.pid).create_time() - self.process_started) < 1.0
        except psutil.Error:
            return
        if alive:
            raise StorageError(
                f"the search {search_id!r} is being run by process {self.pid}: wait for it, or end it, then resume"
            )


def find_search(storage: Storage, name: str | None, target: str | None, source: dict[str, Any]) -> SearchRecord | None:
    """The search to resume: the one of that name, or the newest that ran this target on this source; None if none is.

    Args:
        source: as in :class:`RunInfo`; empty for any.
    """
    if name is not None:
        try:
            return storage.load_search(name)
        except SearchNotFoundError:
            return None
    for search_id in reversed(storage.list_searches()):
        search = storage.load_search(search_id)
        info = RunInfo.of(search)
        if info is not None and info.target == target and source in ({}, info.source):
            return search
    return None


def hint_at(storage: Storage, name: str, aside: str | None = None) -> str:
    """``", did you mean …?"`` for the name of a search, if one is close, ``aside`` left aside."""
    return close_match(name, [known for known in storage.list_searches() if known != aside])


class Backlog:
    """What a search holds already: what is done, and what is to be run again.

    Args:
        retry_failed: what failed is to be run again too.
        see: called with each job that is done.

    Attributes:
        done: how many configurations are done.
        failed: how many of these failed.

    Raises:
        StorageError: another run or worker is at it now.
    """

    def __init__(
        self, storage: Storage, search: SearchRecord, *, retry_failed: bool, see: Callable[[Job], None]
    ) -> None:
        self._storage = storage
        self._search_id = search.id
        self._done: Counter[bytes] = Counter()
        self._again: defaultdict[bytes, deque[tuple[str, str]]] = defaultdict(deque)
        self._left: list[str] = []
        self._notes = sum(1 for name in search.values if name.startswith(SUPERSEDED))
        self.done = 0
        self.failed = 0
        info = RunInfo.of(search)
        if info is not None:
            info.check_not_running(search.id)
        gone = superseded(storage, search)
        self._drop_void_notes(search, gone)
        live: list[JobRecord] = []
        for record in iterate(storage, search.id):
            if record.id in gone:
                continue
            key = config_key(record.args)
            if is_settled(record) and not (retry_failed and has_failed(record)):
                self._done[key] += 1
                self.done += 1
                self.failed += has_failed(record)
                see(job_of(record))
                continue
            if not record.is_complete:
                if record.lease_expires is not None and record.lease_expires > time.time():
                    raise StorageError(f"job {record.id} is being run by the worker {record.worker}: wait for it")
                live.append(record)
            state = record.state if record.is_complete else JobState.CANCELLED
            self._again[key].append((record.id, state.value))
            self._left.append(record.id)
        self._cancel(live)

    @property
    def left(self) -> int:
        """How many stored jobs are to be run again."""
        return sum(map(len, self._again.values()))

    def _drop_void_notes(self, search: SearchRecord, gone: Mapping[str, str]) -> None:
        """A note whose new jobs were never created must not come true when others are."""
        for name, note in search.values.items():
            if name.startswith(SUPERSEDED) and not gone.keys() >= note["ids"].keys():
                self._storage.set_value(search.id, name, {"ids": {}, "jobs": 0})

    def _cancel(self, records: list[JobRecord]) -> None:
        """Nobody runs these any more: let their records say so."""
        for start in range(0, len(records), _BATCH):
            updates = [
                JobUpdate(
                    record.id,
                    JobState.CANCELLED,
                    metadata={**record.metadata, "stop_message": "its run ended before it did"},
                    if_version=record.version,
                )
                for record in records[start : start + _BATCH]
            ]
            try:
                self._storage.update_jobs(updates)
            except VersionConflictError as exc:
                raise StorageError(f"the search {self._search_id!r} is being run by another process: {exc}") from exc

    def is_done(self, args: Mapping[str, Any]) -> bool:
        """Whether this configuration is done; each done job answers for one."""
        if not self._done:
            return False
        key = config_key(args)
        if self._done[key] <= 0:
            return False
        self._done[key] -= 1
        return True

    def note_submit(self, configurations: list[dict[str, Any]]) -> None:
        """These are about to be run: the old jobs of those that are run again count no more."""
        if not self._again:
            return
        ids: dict[str, str] = {}
        for args in configurations:
            key = config_key(args)
            if key in self._again:
                job_id, state = self._again[key].popleft()
                ids[job_id] = state
                if not self._again[key]:
                    del self._again[key]
        if ids:
            jobs = sum(self._storage.count_jobs(self._search_id).values())
            self._storage.set_value(self._search_id, f"{SUPERSEDED}{self._notes}", {"ids": ids, "jobs": jobs})
            self._notes += 1

    def configurations(self) -> Iterator[dict[str, Any]]:
        """The stored configurations that are to be run again, in the order in which they were created."""
        for start in range(0, len(self._left), _BATCH):
            for record in self._storage.load_jobs(self._search_id, ids=self._left[start : start + _BATCH]):
                yield dict(record.args)


def check_seed(given: int | None, before: RunInfo | None, search_id: str) -> int | None:
    """The seed to resume with.

    Raises:
        ParametersError: another one is given than the search was started with.
    """
    if before is None or before.seed is None:
        return given
    if given is not None and given != before.seed:
        raise ParametersError(
            f"the search {search_id!r} was started with --seed {before.seed}, not {given}: leave --seed out, or start "
            "another search"
        )
    return before.seed
