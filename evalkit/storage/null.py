"""NullStorage: ids for jobs, and nothing kept of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from evalkit.job import JobState
from evalkit.storage.base import JobRecord, JobUpdate
from evalkit.storage.local import LocalStorage
from evalkit.storage.naming import check_claim

__all__ = ["NullStorage"]


class _Search:
    def __init__(self, search_id: str) -> None:
        self.id = search_id
        self.created = time.time()
        self.values: dict[str, Any] = {}
        self.jobs = 0


class NullStorage(LocalStorage[_Search]):
    """Keeps nothing of the jobs, for runs whose results the caller keeps.

    Searches and their values exist, and ids are unique. A job's record does not: writes are accepted and forgotten
    (none is ever in conflict), every read is empty, and there is nothing to claim.
    """

    scheme = "null"

    def _new_search(self, search_id: str) -> _Search:
        return _Search(search_id)

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
