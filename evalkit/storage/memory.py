"""MemoryStorage: the records of searches in this process."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from evalkit.errors import SerializationError
from evalkit.job import Job, JobState
from evalkit.storage.base import JobRecord, JobUpdate
from evalkit.storage.local import LocalStorage
from evalkit.storage.memory_table import Table
from evalkit.storage.naming import (
    check_claim,
    job_not_found,
)

__all__ = ["MemoryStorage"]


class MemoryStorage(LocalStorage[Table]):
    """Records in the memory of this process, for as long as the object lives.

    Arguments, outputs, metadata and intermediate records are kept **by reference**: the caller hands over mappings that
    it no longer changes (the evaluator copies the user's parameters before). What is loaded is the caller's own: new
    dicts of the arguments and metadata, with the values in them shared. Jobs that have ended are kept as they are until
    somebody looks: who never reads the storage does not pay for its columns.

    It cannot travel to another process; storages of other schemes (``sqlite:///…``) are shared by URL.
    """

    scheme = "memory"

    def __reduce__(self) -> NoReturn:
        raise SerializationError(
            "a MemoryStorage lives in one process and cannot be pickled: share one by URL, such as sqlite:///study.db",
            "storage",
        )

    def _new_search(self, search_id: str) -> Table:
        return Table(search_id)

    # -- jobs -----------------------------------------------------------------------------------------------------

    def create_jobs(
        self, search_id: str, args_list: Sequence[Mapping[str, Any]], *, owner: str | None = None
    ) -> list[str]:
        with self._lock:
            return self._search(search_id).create(args_list, owner)

    def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
        searches = {update.id.rpartition(".")[0] for update in updates}
        with self._lock:
            batches = []
            for search_id in searches:
                mine = [update for update in updates if update.id.rpartition(".")[0] == search_id]
                table = self._table_of_job(mine[0].id)
                batches.append((table, mine, *table.check(mine)))
            for table, mine, numbers, codes in batches:  # all of them were checked: now nothing can fail
                table.write(mine, numbers, codes)

    def end_jobs(self, jobs: Sequence[Job]) -> None:
        if jobs:
            with self._lock:
                self._table_of_job(jobs[0].id).end_later(jobs)

    def _table_of_job(self, job_id: str) -> Table:
        table = self._searches.get(job_id.rpartition(".")[0])
        if table is None:
            raise job_not_found(job_id)
        return table

    def load_jobs(
        self,
        search_id: str,
        ids: Iterable[str] | None = None,
        states: Collection[JobState] | None = None,
    ) -> list[JobRecord]:
        with self._lock:
            return self._search(search_id).select(ids, states)

    def load_log(self, job_id: str) -> str:
        """As of every storage, but of the newest logs only: 64 MiB of them a search."""
        with self._lock:
            return self._table_of_job(job_id).log(job_id)

    def count_jobs(self, search_id: str) -> dict[JobState, int]:
        with self._lock:
            return self._search(search_id).count()

    def changes(self, search_id: str, cursor: int = 0) -> tuple[list[JobRecord], int]:
        with self._lock:
            return self._search(search_id).changes(cursor)

    # -- the queue that pull workers draw from --------------------------------------------------------------------

    def claim_jobs(self, search_id: str, n: int, worker: str, lease: float) -> list[JobRecord]:
        check_claim(n)
        with self._lock:
            return self._search(search_id).claim(n, worker, time.time() + lease)

    def renew_leases(self, ids: Sequence[str], worker: str, lease: float) -> list[str]:
        expires = time.time() + lease
        with self._lock:
            tables = ((job_id, self._searches.get(job_id.rpartition(".")[0])) for job_id in ids)
            return [job_id for job_id, table in tables if table is not None and table.renew(job_id, worker, expires)]

    def release_expired(self, search_id: str, now: float | None = None) -> list[str]:
        with self._lock:
            return self._search(search_id).release(time.time() if now is None else now)
