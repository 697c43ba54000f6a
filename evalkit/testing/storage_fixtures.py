"""What the parts of the conformance suite of storages stand on: fixtures and helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evalkit.storage import JobRecord, Storage

__all__ = ["NEVER", "Opener", "StorageFixtures", "load_one", "numbers_of"]

NEVER = 3600.0  # a lease that does not run out during a test, in seconds


class StorageFixtures:
    """The storage under test; :class:`evalkit.testing.storage.StorageSuite` says what to define."""

    shared: bool = True
    keeps_jobs: bool = True

    def open_storage(self, tmp_path: Path) -> Storage:
        """Open the storage at a place that belongs to ``tmp_path``; again at the same place for the same path."""
        raise NotImplementedError

    def url_of(self, storage: Storage) -> str:
        """The URL by which another process opens the same storage; with credentials, which ``storage.url`` hides."""
        return storage.url

    # -- fixtures -------------------------------------------------------------------------------------------------

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        """The storage at ``tmp_path``, empty."""
        storage = self.open_storage(tmp_path)
        yield storage
        storage.close()

    @pytest.fixture
    def jobs(self, storage: Storage) -> Storage:
        """The storage, for the tests that read jobs back."""
        if not self.keeps_jobs:
            pytest.skip("this storage keeps no jobs")
        return storage

    @pytest.fixture
    def opener(self, jobs: Storage) -> Callable[[], Storage]:
        """A picklable function that opens the storage again, in whatever process."""
        if not self.shared:
            pytest.skip("this storage is private to the object")
        return Opener(type(jobs), self.url_of(jobs))


class Opener:
    """Opens a storage by URL, in whatever process."""

    def __init__(self, kind: type[Storage], url: str) -> None:
        self.kind = kind
        self.url = url

    def __call__(self) -> Storage:
        return self.kind.from_url(self.url)


def load_one(storage: Storage, job: str) -> JobRecord:
    """Load one job."""
    (record,) = storage.load_jobs(job.rpartition(".")[0], [job])
    return record


def numbers_of(ids: list[str]) -> list[int]:
    """The numbers of job ids."""
    return [int(job.rpartition(".")[2]) for job in ids]
