from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from evalkit.errors import SerializationError, StorageURLError
from evalkit.job import JobState
from evalkit.storage import JobUpdate, MemoryStorage, NullStorage, Storage, memory_table
from evalkit.testing.storage import StorageSuite


class TestMemoryStorage(StorageSuite):
    shared = False

    def open_storage(self, tmp_path: Path) -> Storage:
        return MemoryStorage()


class TestNullStorage(StorageSuite):
    shared = False
    keeps_jobs = False

    def open_storage(self, tmp_path: Path) -> Storage:
        return NullStorage()


def test_memory_holds_the_newest_logs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_table, "_MAX_LOG_SIZE", 100)
    storage = MemoryStorage()
    ids = storage.create_jobs(storage.create_search(), [{}] * 5)
    for job in ids:
        storage.update_jobs([JobUpdate(job, JobState.DONE, log="x" * 40)])
    assert [len(storage.load_log(job)) for job in ids] == [0, 0, 0, 40, 40]


@pytest.mark.parametrize("kind", [MemoryStorage, NullStorage])
def test_urls(kind: type[Storage]) -> None:
    scheme = kind.__name__.removesuffix("Storage").lower()
    assert kind.from_url(f"{scheme}://").url == f"{scheme}://"
    assert not kind.durable
    for wrong in ("sqlite:///x", f"{scheme}://host", ""):
        with pytest.raises(StorageURLError, match=scheme):
            kind.from_url(wrong)


def test_memory_does_not_travel_to_another_process() -> None:
    with pytest.raises(SerializationError, match="sqlite"):
        pickle.dumps(MemoryStorage())


def test_null_forgets_jobs() -> None:
    storage = NullStorage()
    (job,) = storage.create_jobs(storage.create_search(), [{}])
    storage.update_jobs([JobUpdate(job, JobState.DONE, 1.0)])
    assert storage.load_jobs("0") == []
    assert storage.load_jobs("0", [job]) == []
    assert storage.count_jobs("0") == {}
    assert storage.changes("0", 3) == ([], 3)
    assert storage.claim_jobs("0", 1, "worker", 1.0) == []
    assert storage.renew_leases([job], "worker", 1.0) == []
    assert storage.release_expired("0") == []


def test_memory_keeps_by_reference_what_it_is_given() -> None:
    storage = MemoryStorage()
    value = object()
    (job,) = storage.create_jobs(storage.create_search(), [{"value": value}])
    storage.update_jobs([JobUpdate(job, JobState.DONE, value)])
    (record,) = storage.load_jobs("0")
    assert record.args["value"] is value
    assert record.output is value


def test_memory_leases_renewed_often_leave_nothing_behind() -> None:
    storage = MemoryStorage()
    ids = storage.create_jobs(storage.create_search(), [{}, {}])
    first, _ = storage.claim_jobs("0", 2, "worker", 1.0)
    for _ in range(500):  # enough for the heap of expiries to be rebuilt several times
        assert storage.renew_leases(ids, "worker", 100.0) == ids
    assert first.lease_expires is not None
    assert storage.release_expired("0", first.lease_expires + 10) == []
    assert storage.release_expired("0", first.lease_expires + 1000) == ids
