"""The conformance suite of storages: searches, jobs, batches and values."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import (
    FinalStateError,
    JobNotFoundError,
    SearchExistsError,
    SearchNotFoundError,
    StorageError,
    VersionConflictError,
)
from evalkit.job import TERMINAL_STATES, ErrorInfo, Job, JobCause, JobMetadata, JobState
from evalkit.storage import JobRecord, JobUpdate, OpaqueValue, Storage
from evalkit.testing.storage_fixtures import NEVER, StorageFixtures, load_one

__all__ = ["StorageRecords", "StorageValues"]

#: What keeps its type in every storage.
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 2**100, 10**5000, 0.1, -0.0, 1e300, math.inf, -math.inf, ""),
    *("text", "ünïcödé ☃ 😀", "nul \0 in it", "\ud800 alone", "__evalkit__"),
    *([1, [2.0, None]], (1, (2.0, "x")), {"a": {"b": [1]}}, {1: "int key", (1, 2): "tuple key", None: 0}),
    *({"__evalkit__": ["tuple", [1]]}, {1, 2}, frozenset({"a"}), b"\0\xff", bytearray(b"x"), 1 + 2j),
    datetime.datetime(2024, 2, 29, 12, 30, 1, 5),
    datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
    datetime.date(2024, 2, 29),
    datetime.time(23, 59),
    datetime.timedelta(days=-1, microseconds=1),
    JobState.DONE,
    Path("some/file"),
]


class Thing:
    """An object that JSON cannot hold; it pickles by reference to this module."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


class StorageRecords(StorageFixtures):
    """Searches, their jobs, and what a write may and may not do."""

    # -- searches -------------------------------------------------------------------------------------------------

    def test_a_search_without_a_name_takes_the_smallest_free_number(self, storage: Storage) -> None:
        assert [storage.create_search() for _ in range(3)] == ["0", "1", "2"]
        storage.create_search("4")
        storage.delete_search("1")
        assert [storage.create_search() for _ in range(3)] == ["1", "3", "5"]

    def test_searches_are_listed_oldest_first(self, storage: Storage) -> None:
        for name in ("z", "10", "a name, with. dots", "ü", "007"):
            assert storage.create_search(name) == name
        assert storage.list_searches() == ["z", "10", "a name, with. dots", "ü", "007"]
        assert storage.load_search("ü").id == "ü"
        assert storage.load_search("z").created > 1e9

    def test_a_search_is_created_once(self, storage: Storage) -> None:
        storage.create_search("one")
        with pytest.raises(SearchExistsError, match="one"):
            storage.create_search("one")

    @pytest.mark.parametrize("name", ["", "line\nbreak", "nul\0"])
    def test_a_search_id_is_printable(self, storage: Storage, name: str) -> None:
        with pytest.raises(ValueError, match="search id"):
            storage.create_search(name)

    def test_a_missing_search_is_said_with_a_close_match(self, storage: Storage) -> None:
        storage.create_search("resnet-sweep")
        calls: list[Callable[[str], Any]] = [
            storage.load_search,
            storage.delete_search,
            lambda name: storage.set_value(name, "key", 1),
            lambda name: storage.get_value(name, "key"),
            lambda name: storage.create_jobs(name, [{}]),
            storage.load_jobs,
            storage.count_jobs,
            storage.changes,
            lambda name: storage.claim_jobs(name, 1, "worker", 1.0),
            storage.release_expired,
        ]
        for call in calls:
            with pytest.raises(SearchNotFoundError, match="resnet-sweep") as caught:
                call("resnet-swep")
            assert caught.value.search_id == "resnet-swep"

    def test_a_deleted_search_takes_its_jobs_along(self, jobs: Storage) -> None:
        search = jobs.create_search("gone")
        (job,) = jobs.create_jobs(search, [{"x": 1}])
        jobs.set_value(search, "key", 1)
        jobs.delete_search(search)
        assert jobs.list_searches() == []
        with pytest.raises(JobNotFoundError):
            jobs.update_jobs([JobUpdate(job, JobState.DONE)])
        jobs.create_search("gone")
        assert jobs.load_jobs("gone") == []
        assert jobs.count_jobs("gone") == {}
        assert jobs.changes("gone")[0] == []
        assert jobs.get_value("gone", "key", "nothing") == "nothing"
        assert jobs.create_jobs("gone", [{}]) == ["gone.0"]

    def test_values_of_a_search(self, storage: Storage) -> None:
        search, other = storage.create_search(), storage.create_search()
        assert storage.get_value(search, "key") is None
        assert storage.get_value(search, "key", 7) == 7
        storage.set_value(search, "key", {"a": (1, 2)})
        storage.set_value(search, "", None)
        storage.set_value(other, "key", "other")
        assert storage.get_value(search, "key") == {"a": (1, 2)}
        assert storage.get_value(search, "", 7) is None
        storage.set_value(search, "key", [3])
        assert storage.load_search(search).values == {"key": [3], "": None}

    # -- jobs -----------------------------------------------------------------------------------------------------

    def test_ids_are_numbered_in_order(self, storage: Storage) -> None:
        search = storage.create_search("a.b")
        assert storage.create_jobs(search, []) == []
        assert storage.create_jobs(search, [{"x": 0}, {"x": 1}]) == ["a.b.0", "a.b.1"]
        assert storage.create_jobs(search, [{"x": 2}]) == ["a.b.2"]
        assert storage.create_jobs(storage.create_search(), [{}]) == ["0.0"]

    def test_a_new_job(self, jobs: Storage) -> None:
        search = jobs.create_search()
        jobs.create_jobs(search, [{"x": 1, "y": "two"}], owner="me")
        (record,) = jobs.load_jobs(search)
        assert record == JobRecord(
            id="0.0", search_id="0", args={"x": 1, "y": "two"}, owner="me", created=record.created
        )
        assert record.created > 1e9
        assert record.version == 1

    @pytest.mark.parametrize("look", ["load", "count", "changes", "claim", "update"])
    def test_the_ends_of_live_jobs_are_there_for_whoever_looks_first(self, jobs: Storage, look: str) -> None:
        search = jobs.create_search()
        ended = [Job(job, {}) for job in jobs.create_jobs(search, [{}, {}, {}])[:2]]
        for job, state in zip(ended, (JobState.DONE, JobState.FAILED), strict=True):
            job.start(2.0)
            job.finish(state, {"objective": 1, "metadata": {"layers": 3}}, told=5.0)
        jobs.end_jobs(ended)
        if look == "load":
            records = jobs.load_jobs(search)[:2]
            assert [record.state for record in records] == [JobState.DONE, JobState.FAILED]
            assert [record.output for record in records] == [job.output for job in ended]
            assert [record.metadata for record in records] == [dict(job.metadata) for job in ended]
        elif look == "count":
            assert jobs.count_jobs(search) == {JobState.QUEUED: 1, JobState.DONE: 1, JobState.FAILED: 1}
        elif look == "changes":
            assert len([record for record in jobs.changes(search)[0] if record.is_complete]) == 2
        elif look == "claim":
            assert [record.number for record in jobs.claim_jobs(search, 3, "me", 60.0)] == [2]
        else:
            for job in ended:
                with pytest.raises(FinalStateError):
                    jobs.update_jobs([JobUpdate(job.id, JobState.RUNNING)])

    def test_an_update_writes_what_is_given_and_leaves_the_rest(self, jobs: Storage) -> None:
        (job,) = jobs.create_jobs(jobs.create_search(), [{"x": 1}])
        metadata = JobMetadata(0.5)  # a mapping, and no dict
        metadata.extra = {"layers": 3}
        error = ErrorInfo("ValueError", "no \0 such", "Traceback …", exit_code=1, signal="SIGKILL")
        jobs.update_jobs([JobUpdate(job, JobState.RUNNING, attempt=2, worker="me", records=[{"loss": math.inf}])])
        jobs.update_jobs([JobUpdate(job, output="not yet", metadata=metadata)])
        record = load_one(jobs, job)
        assert (record.state, record.attempt, record.worker, record.version) == (JobState.RUNNING, 2, "me", 3)
        assert record.records == [{"loss": math.inf}]
        assert record.metadata == {"timestamp_submit": 0.5, "attempt": 0, "layers": 3}
        assert record.output is None
        jobs.update_jobs([JobUpdate(job, JobState.FAILED, output=(1, 2), error=error, cause=JobCause.CRASH)])
        record = load_one(jobs, job)
        assert (record.state, record.output, record.error, record.cause) == (
            *(JobState.FAILED, (1, 2), error),
            JobCause.CRASH,
        )
        assert (record.attempt, record.worker, record.records) == (2, "me", [{"loss": math.inf}])

    def test_jobs_are_loaded_by_number_id_and_state(self, jobs: Storage) -> None:
        search = jobs.create_search()
        ids = jobs.create_jobs(search, [{"x": x} for x in range(12)])
        jobs.update_jobs([JobUpdate(ids[11], JobState.DONE), JobUpdate(ids[2], JobState.FAILED)])
        assert [record.id for record in jobs.load_jobs(search)] == ids
        assert [record.number for record in jobs.load_jobs(search, [ids[10], ids[9], ids[10]])] == [9, 10]
        assert [record.number for record in jobs.load_jobs(search, states={JobState.DONE, JobState.FAILED})] == [2, 11]
        assert [record.number for record in jobs.load_jobs(search, ids[:3], [JobState.QUEUED])] == [0, 1]
        assert jobs.load_jobs(search, []) == []
        assert jobs.load_jobs(search, states=[]) == []
        assert jobs.count_jobs(search) == {JobState.QUEUED: 10, JobState.DONE: 1, JobState.FAILED: 1}

    @pytest.mark.parametrize(
        "wrong", ["0.1", "0.-1", "0.00", "0. 0", "0.", "0", "1.0", "", "0.99999999999999999999", f"0.{9 * 10**4200}"]
    )
    def test_a_missing_job_is_an_error(self, jobs: Storage, wrong: str) -> None:
        search = jobs.create_search()
        (job,) = jobs.create_jobs(search, [{}])
        with pytest.raises(JobNotFoundError):
            jobs.load_jobs(search, [job, wrong])
        with pytest.raises(JobNotFoundError):
            jobs.update_jobs([JobUpdate(job, JobState.DONE), JobUpdate(wrong, JobState.DONE)])
        assert load_one(jobs, job).version == 1
        assert jobs.renew_leases([wrong], "worker", 1.0) == []

    def test_what_is_loaded_is_the_callers_own(self, jobs: Storage) -> None:
        search = jobs.create_search()
        (job,) = jobs.create_jobs(search, [{"x": 1}])
        jobs.update_jobs([JobUpdate(job, metadata={"a": 1}, records=[{"b": 1}])])
        record = load_one(jobs, job)
        record.args["x"] = record.metadata["a"] = record.records[0]["b"] = 2
        record.records.append({})
        again = load_one(jobs, job)
        assert (again.args, again.metadata, again.records) == ({"x": 1}, {"a": 1}, [{"b": 1}])

    # -- batches, versions, finality ------------------------------------------------------------------------------

    @pytest.mark.parametrize("several", [False, True], ids=["one search", "several searches"])
    @pytest.mark.parametrize("error", [JobNotFoundError, VersionConflictError, FinalStateError])
    def test_a_batch_is_written_whole_or_not_at_all(
        self, jobs: Storage, error: type[StorageError], several: bool
    ) -> None:
        first, second = jobs.create_search(), jobs.create_search()
        ids = jobs.create_jobs(first, [{}, {}])
        (last,) = jobs.create_jobs(second if several else first, [{}])
        jobs.update_jobs([JobUpdate(last, JobState.DONE if error is FinalStateError else JobState.RUNNING)])
        bad = JobUpdate("0.77" if error is JobNotFoundError else last, JobState.CANCELLED, if_version=1)
        if error is FinalStateError:
            bad.if_version = 2
        before = [*jobs.load_jobs(first), *jobs.load_jobs(second)]
        cursors = jobs.changes(first)[1], jobs.changes(second)[1]
        good = [JobUpdate(one, JobState.DONE, output=1.0, if_version=1) for one in ids]
        with pytest.raises(error):
            jobs.update_jobs([good[0], bad, good[1]])
        assert [*jobs.load_jobs(first), *jobs.load_jobs(second)] == before
        assert (jobs.changes(first, cursors[0]), jobs.changes(second, cursors[1])) == (
            ([], cursors[0]),
            ([], cursors[1]),
        )
        jobs.update_jobs(good)
        assert all(load_one(jobs, one).output == 1.0 for one in ids)

    def test_the_updates_of_a_batch_happen_in_order(self, jobs: Storage) -> None:
        (job,) = jobs.create_jobs(jobs.create_search(), [{}])
        jobs.update_jobs([JobUpdate(job, JobState.RUNNING, if_version=1), JobUpdate(job, attempt=3, if_version=2)])
        assert (load_one(jobs, job).version, load_one(jobs, job).attempt) == (3, 3)
        with pytest.raises(FinalStateError):
            jobs.update_jobs([JobUpdate(job, JobState.DONE), JobUpdate(job, JobState.FAILED)])
        with pytest.raises(VersionConflictError):
            jobs.update_jobs([JobUpdate(job, attempt=4, if_version=3), JobUpdate(job, if_version=3)])
        assert load_one(jobs, job).version == 3
        jobs.update_jobs([])

    @pytest.mark.parametrize("state", sorted(TERMINAL_STATES))
    def test_a_terminal_record_never_changes(self, jobs: Storage, state: JobState) -> None:
        search = jobs.create_search()
        (job,) = jobs.create_jobs(search, [{}])
        jobs.claim_jobs(search, 1, "worker", -1.0)
        jobs.update_jobs([JobUpdate(job, state, output=1)])
        before = load_one(jobs, job)
        assert (before.worker, before.lease_expires) == ("worker", None)
        for update in (JobUpdate(job, JobState.RUNNING), JobUpdate(job, metadata={"a": 1}), JobUpdate(job, state)):
            with pytest.raises(FinalStateError, match=job):
                jobs.update_jobs([update])
        assert jobs.claim_jobs(search, 1, "other", NEVER) == []
        assert jobs.renew_leases([job], "worker", NEVER) == []
        assert jobs.release_expired(search, now=1e12) == []
        assert load_one(jobs, job) == before
        assert jobs.count_jobs(search) == {state: 1}

    def test_logs_are_kept_beside_the_records(self, jobs: Storage) -> None:
        search = jobs.create_search()
        ids = jobs.create_jobs(search, [{}, {}, {}])
        log = "epoch 1\n\0 ☃ \ud800 " + "x" * 2**16
        jobs.update_jobs([JobUpdate(ids[0], JobState.RUNNING, log="what came first")])
        assert jobs.load_log(ids[0]) == "what came first"
        jobs.update_jobs([JobUpdate(ids[0], JobState.DONE, log=log), JobUpdate(ids[1], JobState.FAILED, log="short")])
        assert [jobs.load_log(job) for job in ids] == [log, "short", ""]
        with pytest.raises(FinalStateError):
            jobs.update_jobs([JobUpdate(ids[0], log="later")])
        with pytest.raises(JobNotFoundError):
            jobs.update_jobs([JobUpdate(ids[2], JobState.DONE, log="unwritten"), JobUpdate(f"{search}.9", log="none")])
        assert [jobs.load_log(job) for job in ids] == [log, "short", ""]
        for missing in (f"{search}.9", "no such search.0"):
            with pytest.raises(JobNotFoundError, match="9" if "9" in missing else "no such search"):
                jobs.load_log(missing)
        jobs.delete_search(search)
        with pytest.raises(JobNotFoundError):
            jobs.load_log(ids[0])

    def test_a_version_conflict_says_what_was_found(self, jobs: Storage) -> None:
        (job,) = jobs.create_jobs(jobs.create_search(), [{}])
        jobs.update_jobs([JobUpdate(job, JobState.RUNNING)])
        with pytest.raises(VersionConflictError) as caught:
            jobs.update_jobs([JobUpdate(job, JobState.DONE, if_version=1)])
        assert (caught.value.job_id, caught.value.expected, caught.value.found) == (job, 1, 2)


class StorageValues(StorageFixtures):
    """What goes in comes out."""

    # -- values ---------------------------------------------------------------------------------------------------

    def test_values_keep_their_types(self, jobs: Storage) -> None:
        search = jobs.create_search()
        (job,) = jobs.create_jobs(search, [{"value": VALUES}])
        jobs.update_jobs([JobUpdate(job, JobState.DONE, output=VALUES, metadata={"value": VALUES})])
        jobs.set_value(search, "value", VALUES)
        record = load_one(jobs, job)
        for found in (record.args["value"], record.output, record.metadata["value"], jobs.get_value(search, "value")):
            assert found == VALUES
            assert [type(one) for one in found] == [type(one) for one in VALUES]

    def test_numpy_keeps_its_types(self, jobs: Storage) -> None:
        numpy = pytest.importorskip("numpy")
        array = numpy.arange(6, dtype="<f4").reshape(2, 3)
        values = {
            "f": numpy.float64(0.1),
            "i": numpy.int8(-1),
            "b": numpy.bool_(True),
            "s": numpy.str_("x"),
            "a": array,
        }
        (job,) = jobs.create_jobs(jobs.create_search(), [values])
        found = load_one(jobs, job).args
        assert all(type(found[name]) is type(value) for name, value in values.items())
        assert all(found[name] == values[name] for name in "fibs")
        assert (found["a"].dtype, found["a"].tolist()) == (array.dtype, array.tolist())

    def test_nan_and_a_large_output_and_an_object_are_kept(self, jobs: Storage) -> None:
        large = os.urandom(20 * 2**20)
        ids = jobs.create_jobs(jobs.create_search(), [{}, {}, {}])
        outputs: list[Any] = [math.nan, large, {"thing": Thing(3)}]
        jobs.update_jobs([JobUpdate(job, JobState.DONE, one) for job, one in zip(ids, outputs, strict=True)])
        nan, bulk, thing = (record.output for record in jobs.load_jobs("0"))
        assert math.isnan(nan)
        assert bulk == large
        found = thing["thing"]
        assert (found.open() if isinstance(found, OpaqueValue) else found) == Thing(3)
