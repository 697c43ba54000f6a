from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import (
    StorageError,
    StorageFormatError,
    StorageUnavailableError,
    StorageURLError,
)
from evalkit.job import JobState
from evalkit.storage import JobUpdate, OpaqueValue, SQLStorage, Storage
from evalkit.storage.sql_schema import SCHEMA_VERSION
from evalkit.testing.storage import StorageSuite
from evalkit.testing.together import in_processes


class TestSQLite(StorageSuite):
    def open_storage(self, tmp_path: Path) -> Storage:
        return SQLStorage(f"sqlite:///{tmp_path}/study.db")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


@pytest.fixture
def storage(path: Path) -> Iterator[SQLStorage]:
    with contextlib.closing(SQLStorage(f"sqlite:///{path}", timeout=0.05)) as storage:
        yield storage


def raw(path: Path, *statements: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements]


# -- what is at the URL -----------------------------------------------------------------------------------------------


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(SQLStorage.from_url("sqlite:///study.db")) as storage:
        assert storage.url == f"sqlite:///{tmp_path}/study.db"
        storage.create_search("here")
        storage.close()
        monkeypatch.chdir("/")
        assert storage.list_searches() == ["here"]
        assert repr(storage) == f"SQLStorage('sqlite:///{tmp_path}/study.db')"


@pytest.mark.parametrize(
    "url",
    [
        *("", "study.db", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://study.db", "mysql://host/db"),
        *("memory://", "sqlite+aiosqlite:///x", "sqlite:///x?mode=ro", "sqlite:///x?timeout=soon"),
        *("postgresql+psycopg2://host/db", "postgresql://host:port/db"),
    ],
)
def test_urls_of_nothing(url: str) -> None:
    with pytest.raises(StorageURLError):
        SQLStorage(url)


def test_a_newer_schema_is_refused_with_both_versions(storage: SQLStorage, path: Path) -> None:
    storage.create_search("kept")
    storage.close()
    raw(path, "UPDATE evalkit_schema SET version = 7")
    with pytest.raises(StorageFormatError, match=rf"version 7 .*version {SCHEMA_VERSION}: open it with"):
        SQLStorage(f"sqlite:///{path}")
    raw(path, f"UPDATE evalkit_schema SET version = {SCHEMA_VERSION}")
    assert storage.list_searches() == ["kept"]


def _make_version_1(path: Path) -> list[str]:
    """A database as evalkit wrote it before there were logs; return the ids of its jobs."""
    with contextlib.closing(SQLStorage(f"sqlite:///{path}")) as storage:
        ids = storage.create_jobs(storage.create_search("old"), [{"x": 1}, {"x": 2}])
        storage.update_jobs([JobUpdate(ids[0], JobState.DONE, 5)])
    raw(path, "DROP TABLE evalkit_logs", "UPDATE evalkit_schema SET version = 1")
    return ids


def test_a_database_of_version_1_is_upgraded(path: Path) -> None:
    ids = _make_version_1(path)
    with contextlib.closing(SQLStorage(f"sqlite:///{path}")) as storage:
        assert [record.output for record in storage.load_jobs("old")] == [5, None]
        assert storage.load_log(ids[0]) == ""
        storage.update_jobs([JobUpdate(ids[1], JobState.DONE, 6, log="new")])
        assert storage.load_log(ids[1]) == "new"
    assert raw(path, "SELECT version FROM evalkit_schema") == [[(SCHEMA_VERSION,)]]


def test_four_processes_upgrade_it_at_once(path: Path) -> None:
    ids = _make_version_1(path)
    assert in_processes(4, _write_log, f"sqlite:///{path}", ids[1]) == ["written"] * 4


def _write_log(i: int, url: str, job: str) -> str:
    with contextlib.closing(SQLStorage.from_url(url)) as storage:
        storage.update_jobs([JobUpdate(job, log="written")])
        return storage.load_log(job)


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_text("x = 1\n" * 1000)
    with pytest.raises(StorageFormatError, match=str(path)):
        SQLStorage(f"sqlite:///{path}")
    assert path.read_text() == "x = 1\n" * 1000


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    raw(path, "CREATE TABLE trials (id)")
    before = path.read_bytes()
    with pytest.raises(StorageFormatError, match="trials"):
        SQLStorage(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_an_empty_file_is_a_new_database(path: Path) -> None:
    path.touch()
    with contextlib.closing(SQLStorage(f"sqlite:///{path}")) as storage:
        assert storage.create_search() == "0"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("missing/study.db", "missing does not exist"),
        ("file/study.db", "file is not a folder"),
        ("folder", "is a folder"),
    ],
)
def test_a_place_where_no_file_can_be(tmp_path: Path, place: str, says: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageUnavailableError, match=says):
        SQLStorage(f"sqlite:///{tmp_path}/{place}")


def _open_first(i: int, url: str) -> tuple[str, list[str]]:
    with contextlib.closing(SQLStorage.from_url(url)) as storage:
        return storage.create_search(), storage.create_jobs(storage.create_search(f"named-{i}"), [{}, {}])


def test_four_processes_open_it_first(path: Path) -> None:
    results = in_processes(4, _open_first, f"sqlite:///{path}")
    assert sorted(search for search, _ in results) == ["0", "1", "2", "3"]
    assert [jobs for _, jobs in results] == [[f"named-{i}.0", f"named-{i}.1"] for i in range(4)]


# -- trouble ----------------------------------------------------------------------------------------------------------


def test_a_locked_database_is_unavailable_after_the_timeout(storage: SQLStorage, path: Path) -> None:
    search = storage.create_search()
    (job,) = storage.create_jobs(search, [{}])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailableError, match=r"locked by others for 0\.05 s"):
            storage.update_jobs([JobUpdate(job, JobState.DONE)])
        with pytest.raises(StorageUnavailableError):
            storage.create_jobs(search, [{}])
        assert storage.count_jobs(search) == {JobState.QUEUED: 1}  # who reads does not wait
        other.execute("ROLLBACK")
    storage.update_jobs([JobUpdate(job, JobState.DONE)])
    assert storage.create_jobs(search, [{}]) == ["0.1"]


def test_a_full_disk_writes_nothing_and_is_got_over(path: Path) -> None:
    script = f"""
import resource, signal
from evalkit.errors import StorageUnavailableError
from evalkit.job import JobState
from evalkit.storage import JobUpdate, SQLStorage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
storage = SQLStorage("sqlite:///{path}")
search = storage.create_search()
ids = storage.create_jobs(search, [{{}}, {{}}])
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
for _ in range(2):
    try:
        storage.update_jobs([JobUpdate(ids[0], JobState.DONE), JobUpdate(ids[1], JobState.DONE, b"x" * 1_000_000)])
    except StorageUnavailableError as exc:
        print("refused", {str(path)!r} in str(exc))
    print([record.version for record in storage.load_jobs(search)])
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
storage.update_jobs([JobUpdate(ids[0], JobState.DONE), JobUpdate(ids[1], JobState.DONE, b"x" * 1_000_000)])
print([len(record.output or "") for record in storage.load_jobs(search)], storage.count_jobs(search))
storage.close()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *(["refused True", "[1, 1]"] * 2),
        "[0, 1000000] {<JobState.DONE: 'DONE'>: 2}",
    ]
    assert done.stderr == ""


def test_names_that_the_database_cannot_hold(storage: SQLStorage) -> None:
    search = storage.create_search()
    for call in (lambda: storage.load_search("\ud800"), lambda: storage.create_jobs(search, [{}], owner="\ud800")):
        with pytest.raises(StorageError, match="refused"):
            call()
    assert storage.create_jobs(search, [{}]) == ["0.0"]


def test_an_exception_in_the_middle_leaves_nothing(storage: SQLStorage) -> None:
    search = storage.create_search()
    for _ in range(3):
        with pytest.raises(LookupError):
            storage.update_jobs([JobUpdate("0.5", JobState.DONE)])
    assert storage.create_jobs(search, [{}]) == ["0.0"]


def test_a_search_deleted_and_made_again_elsewhere_is_another(storage: SQLStorage, path: Path) -> None:
    storage.create_jobs(storage.create_search("s"), [{"old": 1}])
    with contextlib.closing(SQLStorage(f"sqlite:///{path}")) as other:
        other.delete_search("s")
        other.create_search("s")
    assert storage.load_jobs("s") == []
    assert storage.create_jobs("s", [{"new": 1}]) == ["s.0"]
    assert raw(path, "SELECT count(*) FROM evalkit_jobs") == [[(1,)]]


# -- processes --------------------------------------------------------------------------------------------------------


def test_a_forked_child_has_its_own_connections(path: Path) -> None:
    script = f"""
import os, threading
from evalkit.storage import SQLStorage
storage = SQLStorage("sqlite:///{path}")
search = storage.create_search()
storage.create_jobs(search, [{{}}])
child = os.fork()
if child == 0:
    storage.create_jobs(search, [{{}}] * 2)
    storage.close()
    os._exit(len(storage.load_jobs(search)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(storage.create_jobs(search, [{{}}]), len(storage.load_jobs(search)))
storage.close()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["3", "['0.3'] 4"]


def test_close_leaves_one_file_and_no_descriptor(path: Path) -> None:
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    storage = SQLStorage(f"sqlite:///{path}")
    storage.create_jobs(storage.create_search(), [{}] * 100)
    threads = [threading.Thread(target=storage.load_jobs, args=("0",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage.close()
    assert [one.name for one in path.parent.iterdir()] == ["study.db"]
    assert not before or set(os.listdir("/proc/self/fd")) == before


def test_it_travels_as_its_url(storage: SQLStorage) -> None:
    storage.create_search("there")
    with contextlib.closing(pickle.loads(pickle.dumps(storage))) as other:
        assert other.list_searches() == ["there"]
        assert other.url == storage.url


def test_a_pickle_is_opened_only_if_allowed(storage: SQLStorage, path: Path) -> None:
    (job,) = storage.create_jobs(storage.create_search(), [{"x": {1}, "signals": signal.Signals}])
    storage.update_jobs([JobUpdate(job, JobState.DONE, signal.Signals)])
    (record,) = storage.load_jobs("0")
    assert type(record.output) is OpaqueValue
    assert type(record.args["signals"]) is OpaqueValue
    with contextlib.closing(SQLStorage(f"sqlite:///{path}", allow_pickle=True)) as trusting:
        (record,) = trusting.load_jobs("0")
    assert (record.output, record.args) == (signal.Signals, {"x": {1}, "signals": signal.Signals})


def test_importing_evalkit_imports_no_engine() -> None:
    script = "import sys, evalkit.storage; assert not {'sqlalchemy', 'sqlite3', 'psycopg'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_call_touches_rows_by_index(storage: SQLStorage, path: Path) -> None:
    """Cost is what a call touches: no statement on jobs reads the whole table, nor sorts."""
    statements: list[str] = []
    search = storage.create_search()
    ids = storage.create_jobs(search, [{}] * 3)
    storage.close()

    def trace(connection: sqlite3.Connection, statement: str) -> None:
        if "evalkit_jobs" in statement and not statement.startswith(("INSERT", "--")):
            statements.append(statement)

    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(lambda statement: trace(connection, statement))
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        patch.setattr(sqlite3.dbapi2, "connect", traced)
        storage.claim_jobs(search, 1, "worker", 1.0)
        storage.renew_leases(ids, "worker", 1.0)
        storage.release_expired(search, 1e12)
        storage.update_jobs([JobUpdate(ids[0], JobState.RUNNING), JobUpdate(ids[1], JobState.DONE)])
        storage.load_jobs(search, ids)
        storage.load_jobs(search, states=[JobState.QUEUED])
        storage.changes(search, 2)
        storage.count_jobs(search)
        storage.close()
    assert len(statements) > 10
    plans = raw(path, *(f"EXPLAIN QUERY PLAN {statement}" for statement in statements))
    details = [row[3] for plan in plans for row in plan]
    assert all(detail.startswith("SEARCH") for detail in details if "evalkit_jobs" in detail), details
