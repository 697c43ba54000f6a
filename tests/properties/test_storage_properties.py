"""Storages against a dict, under interleavings that hypothesis makes up."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bounds import bounded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from evalkit import ErrorInfo, JobCause, JobState
from evalkit.errors import (
    FinalStateError,
    JobNotFoundError,
    SearchExistsError,
    SearchNotFoundError,
    VersionConflictError,
)
from evalkit.job import TERMINAL_STATES
from evalkit.plugins import plugins
from evalkit.storage.base import JobRecord, JobUpdate, Storage

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)
values = scalars | st.tuples(scalars, scalars) | st.lists(scalars, max_size=3)
mappings = st.dictionaries(st.text(max_size=3), values, max_size=3)
searches = st.sampled_from(["0", "1", "2", "a.b", "ü ö"])
places = st.integers(0, 30)
FAR = 1e6  # seconds


@dataclass
class Row:
    """What is to be stored of a job."""

    args: dict[str, Any]
    owner: str | None
    state: JobState = JobState.QUEUED
    version: int = 1
    attempt: int = 0
    output: Any = None
    error: ErrorInfo | None = None
    cause: JobCause | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    worker: str | None = None
    leased: bool = False
    written: int = 0

    def matches(self, record: JobRecord) -> bool:
        mine = (self.args, self.owner, self.state, self.version, self.attempt, self.output, self.error, self.cause)
        found = (record.args, record.owner, record.state, record.version, record.attempt, record.output)
        assert (*found, record.error, record.cause) == mine
        assert (record.records, record.metadata, record.worker) == (self.records, self.metadata, self.worker)
        assert (record.lease_expires is not None) == self.leased
        return True


updates = st.fixed_dictionaries(
    {"place": places, "version": st.sampled_from([None, None, 0, 0, -1])},
    optional={
        "state": st.sampled_from(
            [JobState.QUEUED, JobState.RUNNING, JobState.DONE, JobState.FAILED, JobState.CANCELLING]
        ),
        "output": values,
        "error": st.just(ErrorInfo("E", "m")),
        "cause": st.sampled_from(JobCause),
        "metadata": mappings,
        "records": st.lists(mappings, max_size=2),
        "attempt": st.integers(0, 5),
        "worker": st.sampled_from(["u", "v"]),
    },
)


class StorageMachine(RuleBasedStateMachine):
    """A storage, opened twice where that is possible, and a dict of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, dict[str, Row]] = {}
        self.values: dict[tuple[str, str], Any] = {}
        self.writes = 0
        self.cursors: dict[str, tuple[int, int]] = {}
        self.storages = self.open()

    def open(self) -> list[Storage]:
        raise NotImplementedError

    @property
    def storage(self) -> Storage:
        """One of the openings, each in its turn."""
        self.storages.append(self.storages.pop(0))
        return self.storages[0]

    @initialize()
    def first(self) -> None:
        assert self.storage.create_search() == "0"
        self.model["0"] = {}

    def missing(self, search: str) -> bool:
        if search in self.model:
            return False
        with pytest.raises(SearchNotFoundError):
            self.storage.load_jobs(search)
        with pytest.raises(SearchNotFoundError):
            self.storage.create_jobs(search, [{}])
        return True

    def wrote(self, row: Row) -> None:
        self.writes += 1
        row.written = self.writes

    @rule(search=searches)
    def create_search(self, search: str) -> None:
        if search in self.model:
            with pytest.raises(SearchExistsError):
                self.storage.create_search(search)
        else:
            assert self.storage.create_search(search) == search
            self.model[search] = {}

    @rule(search=searches)
    def delete_search(self, search: str) -> None:
        if not self.missing(search):
            self.storage.delete_search(search)
            del self.model[search]
            self.cursors.pop(search, None)
            self.values = {key: value for key, value in self.values.items() if key[0] != search}

    @rule(search=searches, key=st.text(max_size=2), value=values)
    def set_value(self, search: str, key: str, value: Any) -> None:
        if not self.missing(search):
            self.storage.set_value(search, key, value)
            self.values[search, key] = value
            assert self.storage.get_value(search, key) == value
            assert self.storage.get_value(search, key + "?", 7) == self.values.get((search, key + "?"), 7)

    @rule(search=searches, args=st.lists(mappings, max_size=4), owner=st.sampled_from([None, "me"]))
    def create(self, search: str, args: list[dict[str, Any]], owner: str | None) -> None:
        if self.missing(search):
            return
        rows = self.model[search]
        first = len(rows)
        ids = self.storage.create_jobs(search, args, owner=owner)
        assert ids == [f"{search}.{first + place}" for place in range(len(args))]
        for job_id, one in zip(ids, args, strict=True):
            rows[job_id] = Row(one, owner)
            self.wrote(rows[job_id])

    @rule(batch=st.lists(st.tuples(searches, updates), min_size=1, max_size=4), unknown=st.integers(0, 9))
    def update(self, batch: list[tuple[str, dict[str, Any]]], unknown: int) -> None:
        written: list[JobUpdate] = []
        seen: dict[str, tuple[int, JobState]] = {}
        errors: set[type[Exception]] = set()
        for search, given in batch:
            rows = self.model.get(search)
            if not rows:
                continue
            fields = dict(given)
            job_id = list(rows)[fields.pop("place") % len(rows)]
            offset = fields.pop("version")
            version, state = seen.get(job_id, (rows[job_id].version, rows[job_id].state))
            if offset is not None:
                fields["if_version"] = version + offset
            if state in TERMINAL_STATES:
                errors.add(FinalStateError)
            elif offset:
                errors.add(VersionConflictError)
            seen[job_id] = version + 1, fields.get("state") or state
            written.append(JobUpdate(job_id, **fields))
        if unknown == 0:
            written.append(JobUpdate("0.999", JobState.RUNNING))
            errors.add(JobNotFoundError)
        if errors:
            with pytest.raises(tuple(errors)):
                self.storage.update_jobs(written)
            return
        self.storage.update_jobs(written)
        for update in written:
            self.apply(self.model[update.id.rpartition(".")[0]][update.id], update)

    def apply(self, row: Row, update: JobUpdate) -> None:
        row.version += 1
        self.wrote(row)
        if update.state is not None:
            row.state = update.state
            if update.state in TERMINAL_STATES:
                row.output, row.leased = update.output, False
            elif update.state is JobState.QUEUED:
                row.worker, row.leased = None, False
        for name in ("metadata", "error", "cause", "attempt", "records"):
            if getattr(update, name) is not None:
                setattr(row, name, getattr(update, name))
        if update.worker is not None and row.state is not JobState.QUEUED:
            row.worker = update.worker

    @rule(search=searches, n=st.integers(1, 3), worker=st.sampled_from(["u", "v"]), lease=st.sampled_from([-FAR, FAR]))
    def claim(self, search: str, n: int, worker: str, lease: float) -> None:
        if self.missing(search):
            return
        free = [(job_id, row) for job_id, row in self.model[search].items() if row.state is JobState.QUEUED][:n]
        claimed = self.storage.claim_jobs(search, n, worker, lease)
        assert [record.id for record in claimed] == [job_id for job_id, _ in free]
        for _, row in free:
            row.state, row.worker, row.leased, row.version = JobState.RUNNING, worker, True, row.version + 1
            self.wrote(row)
        for record, (_, row) in zip(claimed, free, strict=True):
            assert row.matches(record)

    @rule(search=searches, worker=st.sampled_from(["u", "v"]), lease=st.sampled_from([-FAR, FAR]))
    def renew(self, search: str, worker: str, lease: float) -> None:
        rows = self.model.get(search, {})
        held = [
            job_id
            for job_id, row in rows.items()
            if row.worker == worker and row.state not in TERMINAL_STATES and row.state is not JobState.QUEUED
        ]
        assert sorted(self.storage.renew_leases([*rows, "none.7"], worker, lease)) == sorted(held)
        for job_id in held:
            rows[job_id].leased = True

    @rule(search=searches)
    def release_all(self, search: str) -> None:
        if self.missing(search):
            return
        rows = self.model[search]
        due = [job_id for job_id, row in rows.items() if row.leased and row.state is JobState.RUNNING]
        assert sorted(self.storage.release_expired(search, 1e12)) == sorted(due)
        for job_id in sorted(due, key=lambda job_id: int(job_id.rpartition(".")[2])):
            row = rows[job_id]
            row.state, row.worker, row.leased = JobState.QUEUED, None, False
            row.version, row.attempt = row.version + 1, row.attempt + 1
            self.wrote(row)

    @rule(search=searches)
    def changes(self, search: str) -> None:
        if self.missing(search):
            return
        cursor, seen = self.cursors.get(search, (0, 0))
        records, cursor = self.storage.changes(search, cursor)
        rows = self.model[search]
        changed = sorted((row.written, job_id) for job_id, row in rows.items() if row.written > seen)
        assert [record.id for record in records] == [job_id for _, job_id in changed]
        for record in records:
            assert rows[record.id].matches(record)
        self.cursors[search] = (cursor, self.writes)

    @rule(search=searches, states=st.none() | st.sets(st.sampled_from(JobState)), place=places)
    def load(self, search: str, states: set[JobState] | None, place: int) -> None:
        if self.missing(search):
            return
        rows = self.model[search]
        ids = list(rows)[place % 5 :: 2]
        for asked in (None, ids):
            found = self.storage.load_jobs(search, asked, states)
            expected = [
                job_id
                for job_id in (rows if asked is None else asked)
                if states is None or rows[job_id].state in states
            ]
            assert [record.id for record in found] == expected
            assert all(rows[record.id].matches(record) for record in found)

    @invariant()
    def counts_are_exact(self) -> None:
        for search, rows in self.model.items():
            states = [row.state for row in rows.values()]
            assert self.storage.count_jobs(search) == {state: states.count(state) for state in set(states)}
        assert sorted(self.storage.list_searches()) == sorted(self.model)

    def teardown(self) -> None:
        for search, rows in self.model.items():
            for storage in self.storages:
                for record in storage.load_jobs(search):
                    assert rows[record.id].matches(record)
        for storage in self.storages:
            storage.close()


class MemoryMachine(StorageMachine):
    def open(self) -> list[Storage]:
        return [plugins().open_storage("memory://")]


class SQLiteMachine(StorageMachine):
    def open(self) -> list[Storage]:
        self.folder = Path(tempfile.mkdtemp())
        url = f"sqlite:///{self.folder / 'study.db'}"
        return [plugins().open_storage(url) for _ in range(2)]

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.folder)


MemoryMachine.TestCase.settings = bounded(100, stateful_step_count=40)
SQLiteMachine.TestCase.settings = bounded(25, stateful_step_count=40)
TestMemory = MemoryMachine.TestCase
TestSQLite = SQLiteMachine.TestCase
