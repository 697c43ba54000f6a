"""NullStorage: ids for jobs, and nothing kept of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from evalkit.job import JobState
from evalkit.storage.base import JobRecord, JobUpdate, SearchRecord, Storage
from evalkit.storage.naming import check_bare_url, check_claim, check_search_id, search_exists, search_not_found

__all__ = ["NullStorage"]

_URL = "null://"


class _Search:
    def __init__(self, search_id: str) -> None:
        self.record = SearchRecord(search_id, time.time(), {})
        self.values: dict[str, Any] = {}
        self.jobs = 0


class NullStorage(Storage):
    """Keeps nothing of the jobs, for runs whose results the caller keeps.

    Searches and their values exist, and ids are unique. A job's record does not: writes are accepted and forgotten
    (none is ever in conflict), every read is empty, and there is nothing to claim.
    """

    durable = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches: dict[str, _Search] = {}
        self._lowest_free = 0

    @classmethod
    def from_url(cls, url: str) -> Self:
        check_bare_url(url, "null")
        return cls()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def url(self) -> str:
        return _URL

    def _search(self, search_id: str) -> _Search:
        search = self._searches.get(search_id)
        if search is None:
            raise search_not_found(search_id, self._searches, _URL)
        return search

    def create_search(self, search_id: str | None = None) -> str:
        with self._lock:
            if search_id is None:
                while str(self._lowest_free) in self._searches:
                    self._lowest_free += 1
                search_id = str(self._lowest_free)
            elif check_search_id(search_id) in self._searches:
                raise search_exists(search_id, _URL)
            self._searches[search_id] = _Search(search_id)
            return search_id

    def list_searches(self) -> list[str]:
        with self._lock:
            return list(self._searches)

    def load_search(self, search_id: str) -> SearchRecord:
        with self._lock:
            search = self._search(search_id)
            return SearchRecord(search_id, search.record.created, dict(search.values))

    def delete_search(self, search_id: str) -> None:
        with self._lock:
            self._search(search_id)
            del self._searches[search_id]
            if search_id.isdecimal():
                self._lowest_free = min(self._lowest_free, int(search_id))

    def set_value(self, search_id: str, key: str, value: Any) -> None:
        with self._lock:
            self._search(search_id).values[key] = value

    def get_value(self, search_id: str, key: str, default: Any = None) -> Any:
        with self._lock:
            return self._search(search_id).values.get(key, default)

    def create_jobs(
        self, search_id: str, args_list: Sequence[Mapping[str, Any]], *, owner: str | None = None
    ) -> list[str]:
        with self._lock:
            search = self._search(search_id)
            first = search.jobs
            search.jobs += len(args_list)
        return [f"{search_id}.{number}" for number in range(first, first + len(args_list))]

    def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
        """Forget the updates."""

    def load_jobs(
        self,
        search_id: str,
        ids: Iterable[str] | None = None,
        states: Collection[JobState] | None = None,
    ) -> list[JobRecord]:
        """Nothing, whatever is asked for. Raises ``SearchNotFoundError``."""
        with self._lock:
            self._search(search_id)
        return []

    def count_jobs(self, search_id: str) -> dict[JobState, int]:
        with self._lock:
            self._search(search_id)
        return {}

    def changes(self, search_id: str, cursor: int = 0) -> tuple[list[JobRecord], int]:
        with self._lock:
            self._search(search_id)
        return [], cursor

    def claim_jobs(self, search_id: str, n: int, worker: str, lease: float) -> list[JobRecord]:
        check_claim(n)
        with self._lock:
            self._search(search_id)
        return []

    def renew_leases(self, ids: Sequence[str], worker: str, lease: float) -> list[str]:
        return []

    def release_expired(self, search_id: str, now: float | None = None) -> list[str]:
        with self._lock:
            self._search(search_id)
        return []
