"""The conformance suite of storages: changes, the queue, many writers, and processes that die."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from evalkit.errors import FinalStateError, StorageError, VersionConflictError
from evalkit.job import JobState
from evalkit.storage import JobUpdate, Storage
from evalkit.testing.storage_fixtures import NEVER, StorageFixtures, load_one, numbers_of
from evalkit.testing.together import in_processes, in_threads

__all__ = ["StorageQueue", "StorageSharing"]


class StorageQueue(StorageFixtures):
    """What readers see of the writes, and the queue that pull workers draw from."""

    # -- changes --------------------------------------------------------------------------------------------------

    def test_changes_come_once_in_the_order_of_their_last_write(self, jobs: Storage) -> None:
        search, other = jobs.create_search(), jobs.create_search()
        assert jobs.changes(search) == ([], 0)
        ids = jobs.create_jobs(search, [{"x": x} for x in range(4)])
        jobs.create_jobs(other, [{}])
        jobs.update_jobs([JobUpdate(ids[2], JobState.RUNNING), JobUpdate(ids[0], JobState.DONE, output=5)])
        jobs.update_jobs([JobUpdate(ids[2], JobState.DONE)])
        changed, cursor = jobs.changes(search)
        assert [record.number for record in changed] == [1, 3, 0, 2]
        assert changed == [load_one(jobs, record.id) for record in changed]
        assert jobs.changes(search, cursor) == ([], cursor)
        jobs.claim_jobs(search, 1, "worker", 0.0)
        jobs.create_jobs(search, [{}])
        changed, cursor = jobs.changes(search, cursor)
        assert [(record.number, record.state.value) for record in changed] == [(1, "RUNNING"), (4, "QUEUED")]
        assert jobs.release_expired(search, now=1e12) == [ids[1]]
        assert [record.number for record in jobs.changes(search, cursor)[0]] == [1]

    def test_changes_outlive_many_writes(self, jobs: Storage) -> None:
        search = jobs.create_search()
        ids = jobs.create_jobs(search, [{}, {}, {}])
        cursor = jobs.changes(search)[1]
        for _ in range(600):  # far more writes than jobs: a log of them would have to be cut by now
            jobs.update_jobs([JobUpdate(ids[0], attempt=1), JobUpdate(ids[2], attempt=2)])
        assert [record.number for record in jobs.changes(search)[0]] == [1, 0, 2]
        changed, cursor = jobs.changes(search, cursor)
        assert [(record.number, record.version) for record in changed] == [(0, 601), (2, 601)]
        assert jobs.changes(search, cursor)[0] == []

    # -- the queue ------------------------------------------------------------------------------------------------

    def test_claims_take_the_lowest_numbers(self, jobs: Storage) -> None:
        search = jobs.create_search()
        ids = jobs.create_jobs(search, [{"x": x} for x in range(5)])
        jobs.update_jobs([JobUpdate(ids[1], JobState.CANCELLED)])
        claimed = jobs.claim_jobs(search, 2, "worker", NEVER)
        assert [(one.number, one.state, one.worker, one.version) for one in claimed] == [
            (0, JobState.RUNNING, "worker", 2),
            (2, JobState.RUNNING, "worker", 2),
        ]
        assert all(one.lease_expires is not None and one.lease_expires > one.created for one in claimed)
        assert claimed == jobs.load_jobs(search, [ids[0], ids[2]])
        jobs.update_jobs([JobUpdate(ids[0], JobState.QUEUED)])  # it is put back, and first in the queue again
        assert (load_one(jobs, ids[0]).worker, load_one(jobs, ids[0]).lease_expires) == (None, None)
        assert [one.number for one in jobs.claim_jobs(search, 9, "other", NEVER)] == [0, 3, 4]
        assert jobs.claim_jobs(search, 1, "other", NEVER) == []
        jobs.create_jobs(search, [{}])
        assert [one.number for one in jobs.claim_jobs(search, 1, "other", NEVER)] == [5]
        assert jobs.count_jobs(search) == {JobState.RUNNING: 5, JobState.CANCELLED: 1}

    def test_a_queued_job_is_held_by_nobody(self, jobs: Storage) -> None:
        search = jobs.create_search()
        (job,) = jobs.create_jobs(search, [{}])
        jobs.update_jobs([JobUpdate(job, attempt=1, worker="worker")])
        assert jobs.renew_leases([job], "worker", NEVER) == []
        jobs.update_jobs([JobUpdate(job, JobState.RUNNING, worker="worker")])
        assert jobs.renew_leases([job], "worker", NEVER) == [job]
        jobs.update_jobs([JobUpdate(job, JobState.QUEUED, worker="worker")])
        record = load_one(jobs, job)
        assert (record.worker, record.lease_expires) == (None, None)
        with pytest.raises(ValueError, match="at least 1"):
            jobs.claim_jobs(search, 0, "worker", NEVER)

    def test_leases_are_renewed_by_their_holder_only(self, jobs: Storage) -> None:
        search = jobs.create_search()
        ids = jobs.create_jobs(search, [{}, {}, {}])
        jobs.claim_jobs(search, 2, "worker", 0.0)
        jobs.update_jobs([JobUpdate(ids[1], JobState.CANCELLING)])
        cursor = jobs.changes(search)[1]
        assert jobs.renew_leases(ids, "other", NEVER) == []
        assert jobs.renew_leases([], "worker", NEVER) == []
        assert jobs.renew_leases(ids, "worker", NEVER) == ids[:2]
        assert jobs.release_expired(search) == []
        assert load_one(jobs, ids[0]).version == 2
        assert jobs.changes(search, cursor)[0] == []

    def test_a_lease_that_ran_out_is_released(self, jobs: Storage) -> None:
        search = jobs.create_search()
        ids = jobs.create_jobs(search, [{}, {}])
        first, second = jobs.claim_jobs(search, 2, "worker", 10.0)
        assert first.lease_expires is not None
        assert jobs.release_expired(search, now=first.lease_expires - 5) == []
        jobs.renew_leases([second.id], "worker", NEVER)
        assert jobs.release_expired(search, now=first.lease_expires + 5) == [first.id]
        back = load_one(jobs, first.id)
        assert (back.state, back.attempt, back.worker, back.lease_expires) == (JobState.QUEUED, 1, None, None)
        with pytest.raises(VersionConflictError):  # whoever had held it cannot write to it any more
            jobs.update_jobs([JobUpdate(first.id, JobState.DONE, if_version=first.version)])
        jobs.update_jobs([JobUpdate(second.id, JobState.DONE, if_version=second.version)])
        assert [one.id for one in jobs.claim_jobs(search, 2, "other", NEVER)] == ids[:1]


class StorageSharing(StorageFixtures):
    """Several threads and processes on one storage, and what is left of one that dies."""

    # -- many writers ---------------------------------------------------------------------------------------------

    def test_threads_race(self, storage: Storage) -> None:
        search = storage.create_search()
        given = in_threads(4, lambda i: [storage.create_jobs(search, [{"by": i}] * 3) for _ in range(20)])
        ids = [job for calls in given for call in calls for job in call]
        assert sorted(ids, key=lambda job: int(job.rpartition(".")[2])) == [f"0.{i}" for i in range(240)]
        assert all(numbers_of(call) == list(range(numbers_of(call)[0], numbers_of(call)[0] + 3)) for call in given[0])
        if self.keeps_jobs:
            _check_race(in_threads(4, lambda i: _race(i, storage, search)), storage, search)

    def test_processes_race(self, jobs: Storage, opener: Callable[[], Storage]) -> None:
        search = jobs.create_search()
        _check_race(in_processes(3, _race_in_process, opener, search), jobs, search)

    def test_a_reader_misses_no_change_of_many_writers(self, jobs: Storage) -> None:
        search = jobs.create_search()
        done: list[int] = []

        def write_or_read(i: int) -> dict[str, int]:
            if i:
                for _ in range(30):
                    ids = jobs.create_jobs(search, [{}, {}])
                    jobs.update_jobs([JobUpdate(job, JobState.DONE) for job in ids])
                done.append(i)
                return {}
            seen: dict[str, int] = {}
            cursor, last_round = 0, False
            while True:
                changed, cursor = jobs.changes(search, cursor)
                seen |= {record.id: record.version for record in changed}
                if last_round:
                    return seen
                last_round = len(done) == 3

        seen = in_threads(4, write_or_read)[0]
        assert seen == {f"0.{i}": 2 for i in range(180)}

    # -- opening, closing, dying ----------------------------------------------------------------------------------

    def test_another_opening_sees_the_same_records(self, jobs: Storage, opener: Callable[[], Storage]) -> None:
        search = jobs.create_search()
        (job,) = jobs.create_jobs(search, [{"x": (1, 2)}])
        with contextlib.closing(opener()) as other:
            assert other.load_jobs(search) == jobs.load_jobs(search)
            other.update_jobs([JobUpdate(job, JobState.DONE, 1.5)])
            assert load_one(jobs, job).output == 1.5
            with pytest.raises(FinalStateError):
                jobs.update_jobs([JobUpdate(job, JobState.FAILED)])

    def test_what_a_call_has_written_outlives_a_kill(self, jobs: Storage, opener: Callable[[], Storage]) -> None:
        search = jobs.create_search()
        script = """
            import pickle, sys
            from evalkit.job import JobState
            from evalkit.storage import JobUpdate
            storage = pickle.loads(bytes.fromhex(sys.argv[1]))()
            while True:
                (job,) = storage.create_jobs(sys.argv[2], [{}])
                storage.update_jobs([JobUpdate(job, JobState.DONE, job)])
                print(job, flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(script), pickle.dumps(opener).hex(), search]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            said = [process.stdout.readline().strip() for _ in range(25)]
            process.send_signal(signal.SIGKILL)
            said += process.stdout.read().split()
        assert process.returncode == -signal.SIGKILL
        records = {record.id: record for record in jobs.load_jobs(search)}
        assert [records[job].output for job in said] == said
        assert len(records) <= len(said) + 1
        jobs.create_jobs(search, [{}])  # and others go on writing

    def test_close_may_be_called_twice_and_then_calls_work_or_raise(self, storage: Storage) -> None:
        search = storage.create_search()
        storage.close()
        storage.close()
        with contextlib.suppress(StorageError):
            storage.create_jobs(search, [{}])
        storage.close()


def _race(i: int, storage: Storage, search: str) -> tuple[list[str], list[str], int]:
    """Create jobs, claim whatever is there, and raise a counter by compare-and-swap, beside others who do the same."""
    name = f"racer {i}"
    created = [job for _ in range(10) for job in storage.create_jobs(search, [{}, {}])]
    claimed = []
    for _ in range(20):
        claimed += [record.id for record in storage.claim_jobs(search, 1, name, NEVER)]
    won = 0
    counter = created[0].rpartition(".")[0] + ".0"
    while won < 10:
        (record,) = storage.load_jobs(search, [counter])
        update = JobUpdate(counter, metadata={"count": record.metadata.get("count", 0) + 1}, if_version=record.version)
        try:
            storage.update_jobs([update])
        except VersionConflictError:
            continue
        won += 1
    return created, claimed, won


def _race_in_process(i: int, opener: Callable[[], Storage], search: str) -> tuple[list[str], list[str], int]:
    with contextlib.closing(opener()) as storage:
        return _race(i, storage, search)


def _check_race(results: list[tuple[list[str], list[str], int]], storage: Storage, search: str) -> None:
    created = [job for ids, _, _ in results for job in ids]
    claimed = [job for _, ids, _ in results for job in ids]
    assert len(set(created)) == len(created)
    assert len(set(claimed)) == len(claimed)
    assert load_one(storage, f"{search}.0").metadata["count"] == sum(won for _, _, won in results)
    for i, (_, mine, _) in enumerate(results):
        assert all(record.worker == f"racer {i}" for record in storage.load_jobs(search, mine))
    assert sum(storage.count_jobs(search).values()) == len(storage.load_jobs(search))
    assert len(storage.changes(search)[0]) == len(storage.load_jobs(search))
