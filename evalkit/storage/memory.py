"""MemoryStorage: the records of searches in this process."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Self

from evalkit.errors import SerializationError
from evalkit.job import JobState
from evalkit.storage.base import JobRecord, JobUpdate, SearchRecord, Storage
from evalkit.storage.memory_table import Table, code_of
from evalkit.storage.naming import (
    check_bare_url,
    check_claim,
    check_search_id,
    job_not_found,
    search_exists,
    search_not_found,
)

__all__ = ["MemoryStorage"]

_URL = "memory://"


class MemoryStorage(Storage):
    """Records in the memory of this process, for as long as the object lives.

    Arguments, outputs, metadata and intermediate records are kept **by reference**: the caller hands over mappings that
    it no longer changes (the evaluator copies the user's parameters before). What is loaded is the caller's own: new
    dicts of the arguments and metadata, with the values in them shared.

    It cannot travel to another process; storages of other schemes (``sqlite:///…``) are shared by URL.
    """

    durable = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: dict[str, Table] = {}
        self._lowest_free = 0  # no decimal number below it is free as a search id

    @classmethod
    def from_url(cls, url: str) -> Self:
        check_bare_url(url, "memory")
        return cls()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._tables)} searches)"

    def __reduce__(self) -> NoReturn:
        raise SerializationError(
            "a MemoryStorage lives in one process and cannot be pickled: share one by URL, such as sqlite:///study.db",
            "storage",
        )

    @property
    def url(self) -> str:
        return _URL

    def _table(self, search_id: str) -> Table:
        table = self._tables.get(search_id)
        if table is None:
            raise search_not_found(search_id, self._tables, _URL)
        return table

    # -- searches -------------------------------------------------------------------------------------------------

    def create_search(self, search_id: str | None = None) -> str:
        with self._lock:
            if search_id is None:
                while str(self._lowest_free) in self._tables:
                    self._lowest_free += 1
                search_id = str(self._lowest_free)
            elif check_search_id(search_id) in self._tables:
                raise search_exists(search_id, _URL)
            self._tables[search_id] = Table(search_id)
            return search_id

    def list_searches(self) -> list[str]:
        with self._lock:
            return list(self._tables)

    def load_search(self, search_id: str) -> SearchRecord:
        with self._lock:
            table = self._table(search_id)
            return SearchRecord(table.id, table.created, {key: _copy(value) for key, value in table.values.items()})

    def delete_search(self, search_id: str) -> None:
        with self._lock:
            self._table(search_id)
            del self._tables[search_id]
            if search_id.isdecimal():
                self._lowest_free = min(self._lowest_free, int(search_id))

    def set_value(self, search_id: str, key: str, value: Any) -> None:
        value = _copy(value)
        with self._lock:
            self._table(search_id).values[key] = value

    def get_value(self, search_id: str, key: str, default: Any = None) -> Any:
        with self._lock:
            values = self._table(search_id).values
            return _copy(values[key]) if key in values else default

    # -- jobs -----------------------------------------------------------------------------------------------------

    def create_jobs(
        self, search_id: str, args_list: Sequence[Mapping[str, Any]], *, owner: str | None = None
    ) -> list[str]:
        with self._lock:
            return self._table(search_id).create(args_list, owner)

    def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
        codes: list[int | None] = []
        state: JobState | None = None
        code: int | None = None
        searches = set()
        for update in updates:
            if update.state is not state:  # it is the same one over most of a batch
                state = update.state
                code = None if state is None else code_of(state)
            codes.append(code)
            searches.add(update.id.rpartition(".")[0])
        with self._lock:
            if len(searches) == 1:
                table = self._table_of_job(updates[0].id)
                table.write(updates, table.check(updates), codes)
                return
            batches = []
            for search_id in searches:
                mine = [i for i, update in enumerate(updates) if update.id.rpartition(".")[0] == search_id]
                part = [updates[i] for i in mine]
                table = self._table_of_job(part[0].id)
                batches.append((table, part, table.check(part), [codes[i] for i in mine]))
            for table, part, numbers, part_codes in batches:  # all of them were checked: now nothing can fail
                table.write(part, numbers, part_codes)

    def _table_of_job(self, job_id: str) -> Table:
        table = self._tables.get(job_id.rpartition(".")[0])
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
            return self._table(search_id).select(ids, states)

    def count_jobs(self, search_id: str) -> dict[JobState, int]:
        with self._lock:
            return self._table(search_id).count()

    def changes(self, search_id: str, cursor: int = 0) -> tuple[list[JobRecord], int]:
        with self._lock:
            return self._table(search_id).changes(cursor)

    # -- the queue that pull workers draw from --------------------------------------------------------------------

    def claim_jobs(self, search_id: str, n: int, worker: str, lease: float) -> list[JobRecord]:
        check_claim(n)
        with self._lock:
            return self._table(search_id).claim(n, worker, time.time() + lease)

    def renew_leases(self, ids: Sequence[str], worker: str, lease: float) -> list[str]:
        expires = time.time() + lease
        with self._lock:
            tables = ((job_id, self._tables.get(job_id.rpartition(".")[0])) for job_id in ids)
            return [job_id for job_id, table in tables if table is not None and table.renew(job_id, worker, expires)]

    def release_expired(self, search_id: str, now: float | None = None) -> list[str]:
        with self._lock:
            return self._table(search_id).release(time.time() if now is None else now)


def _copy(value: Any) -> Any:
    """The caller's own copy of a value, as far as it can be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - __deepcopy__ is the user's code; the value itself is better than none
        return value
