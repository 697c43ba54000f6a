from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from evalkit.errors import SerializationError, StorageFormatError, StorageUnavailableError, StorageURLError
from evalkit.storage import JobUpdate, SQLStorage, Storage
from evalkit.storage.sql_schema import SCHEMA_VERSION
from evalkit.testing.storage import StorageSuite
from evalkit.testing.together import in_processes

psycopg = pytest.importorskip("psycopg")


class TestPostgreSQL(StorageSuite):
    @pytest.fixture(autouse=True)
    def _database(self, new_database: Callable[[], str]) -> None:
        self.database = new_database()

    def open_storage(self, tmp_path: Path) -> Storage:
        return SQLStorage(self.database)


def test_credentials_are_never_shown(new_database: Callable[[], str]) -> None:
    url = new_database().replace("postgres:@", "postgres:sesame@") + "&sslpassword=abracadabra"
    with contextlib.closing(SQLStorage(url)) as storage:
        storage.create_search()
        for shown in (storage.url, repr(storage)):
            assert "sesame" not in shown
            assert "abracadabra" not in shown
            assert "***" in shown
        with pytest.raises(SerializationError, match="password") as refused:
            pickle.dumps(storage)
        assert "sesame" not in str(refused.value)


def test_a_server_that_is_away_is_unavailable(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://user:sesame@/db?host={tmp_path}&timeout=1"
    with pytest.raises(StorageUnavailableError) as caught:
        SQLStorage(url)
    said = "".join(traceback.format_exception(caught.value))
    assert "sesame" not in said
    assert "try again later" in said


def test_a_malformed_url_is_not_repeated() -> None:
    url = "postgresql://user:sesame@host:port/db"
    with pytest.raises(StorageURLError) as caught:
        SQLStorage(url)
    assert "sesame" not in "".join(traceback.format_exception(caught.value))


def test_a_lost_connection_is_opened_again(new_database: Callable[[], str]) -> None:
    url = new_database()
    with contextlib.closing(SQLStorage(url)) as storage:
        search = storage.create_search()
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert storage.create_jobs(search, [{}]) == ["0.0"]
        assert len(storage.load_jobs(search)) == 1


def test_a_lock_held_by_others_is_waited_for_in_bounds(new_database: Callable[[], str]) -> None:
    url = new_database()
    with contextlib.closing(SQLStorage(url, timeout=0.05)) as storage:
        search = storage.create_search()
        with psycopg.connect(url.replace("+psycopg", "")) as other:
            other.execute("SELECT * FROM evalkit_searches FOR UPDATE")
            with pytest.raises(StorageUnavailableError, match="locked by others"):
                storage.create_jobs(search, [{}])
            other.rollback()
        assert storage.create_jobs(search, [{}]) == ["0.0"]


def test_a_newer_schema_is_refused(new_database: Callable[[], str]) -> None:
    url = new_database()
    SQLStorage(url).close()
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute("UPDATE evalkit_schema SET version = 7")
    with pytest.raises(StorageFormatError, match=rf"version 7 .*version {SCHEMA_VERSION}"):
        SQLStorage(url)


def test_a_database_of_version_1_is_upgraded(new_database: Callable[[], str]) -> None:
    url = new_database()
    with contextlib.closing(SQLStorage(url)) as storage:
        (job,) = storage.create_jobs(storage.create_search(), [{"x": 1}])
    with psycopg.connect(url.replace("+psycopg", "")) as other:
        other.execute("DROP TABLE evalkit_logs")
        other.execute("UPDATE evalkit_schema SET version = 1")
    with contextlib.closing(SQLStorage(url)) as storage:
        assert storage.load_log(job) == ""
        storage.update_jobs([JobUpdate(job, log="new")])
        assert storage.load_log(job) == "new"


def _open_first(i: int, url: str) -> str:
    with contextlib.closing(SQLStorage.from_url(url)) as storage:
        return storage.create_search()


def test_processes_open_it_first(new_database: Callable[[], str]) -> None:
    assert sorted(in_processes(3, _open_first, new_database())) == ["0", "1", "2"]
