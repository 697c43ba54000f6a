"""Real storages that go away under an evaluator, and come back: nothing is lost, nothing hangs."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from evalkit import Evaluator, JobState, RunningJob
from evalkit.engine import recorder
from evalkit.errors import StorageUnavailableError
from evalkit.storage import MemoryStorage, Storage
from evalkit.testing.functions import echo


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_PATIENCE", 0.3)


class Held:
    """A run function whose jobs from x = 2 on end once they are let go: while the storage is away."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, job: RunningJob) -> int:
        if job["x"] > 1:
            self.go.wait(600.0)
        return job["x"]


def gathered(evaluator: Evaluator, seconds: float = 300.0) -> list[object]:
    """The outputs that are gathered once the storage is back."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return [job.output for job in evaluator.gather("ALL")]
        except StorageUnavailableError:
            if time.monotonic() > deadline:
                raise


def test_a_database_that_another_process_has_locked(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    lock = f"import sqlite3; c = sqlite3.connect({str(path)!r}, isolation_level=None); c.execute('BEGIN EXCLUSIVE')"
    held = Held()
    with Evaluator.create(held, "thread", {"storage": f"sqlite:///{path}?timeout=0.1"}) as evaluator:
        evaluator.submit([{"x": 1}])
        assert gathered(evaluator) == [1]
        evaluator.submit([{"x": x} for x in range(2, 6)])
        with subprocess.Popen(
            [sys.executable, "-c", lock + "; print('locked', flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            held.go.set()
            with pytest.raises(StorageUnavailableError, match="locked"):
                evaluator.gather("ALL")
            with pytest.raises(StorageUnavailableError, match="locked"):
                evaluator.submit([{"x": 9}])
            other.communicate("\n")
        assert gathered(evaluator) == [2, 3, 4, 5]
        assert evaluator.submit([{"x": 6}])
        assert gathered(evaluator) == [6]
        search_id = evaluator.search_id
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Evaluator.create(echo, "serial", {"storage": f"sqlite:///{path}", "search_id": search_id}) as reader:
        assert sorted(job.output for job in reader.gather_other_jobs_done()) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_a_full_disk(method: str) -> None:
    """A limit on the size of files is a full disk that no other program feels."""
    script = f"""
import resource, signal, tempfile
from evalkit import Evaluator
from evalkit.engine import recorder
from evalkit.errors import StorageUnavailableError
recorder._PATIENCE = 0.3
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def large(job):
    return str(job["x"]) * 100_000

with tempfile.TemporaryDirectory() as folder:
    options = {{"num_workers": 2, "storage": f"sqlite:///{{folder}}/study.db"}}
    with Evaluator.create(large, {method!r}, options) as evaluator:
        jobs = evaluator.submit([{{"x": x}} for x in range(9)])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        refused = 0
        for _ in range(2):
            try:
                evaluator.gather("ALL")
            except StorageUnavailableError:
                refused += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert evaluator.gather("ALL") == jobs
        records = evaluator.storage.load_jobs(evaluator.search_id)
        print(refused, [record.output == str(x) * 100_000 for x, record in enumerate(records)].count(True))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "2 9\n", done.stderr


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_moved_away_and_back(replaced: bool, tmp_path: Path) -> None:
    """SQLite alone would go on without a word, and write to what nobody can open."""
    path = tmp_path / "study.db"
    held = Held()
    with Evaluator.create(held, "thread", {"storage": f"sqlite:///{path}"}) as evaluator:
        evaluator.submit([{"x": 1}])
        assert gathered(evaluator) == [1]
        evaluator.submit([{"x": x} for x in range(2, 5)])
        path.rename(tmp_path / "elsewhere.db")
        if replaced:
            path.touch()
        held.go.set()
        with pytest.raises(StorageUnavailableError, match=r"study\.db was deleted, moved or replaced"):
            evaluator.gather("ALL")
        with pytest.raises(StorageUnavailableError, match="put it back"):
            evaluator.submit([{"x": 9}])
        (tmp_path / "elsewhere.db").rename(path)
        assert gathered(evaluator) == [2, 3, 4]
        search_id = evaluator.search_id
    with Evaluator.create(echo, "serial", {"storage": f"sqlite:///{path}", "search_id": search_id}) as reader:
        assert sorted(job.output for job in reader.gather_other_jobs_done()) == [1, 2, 3, 4]


def test_a_file_that_is_deleted_costs_no_result_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    evaluator = Evaluator.create(echo, "thread", {"storage": f"sqlite:///{path}"})
    (job,) = evaluator.submit([{"x": 1}])
    assert job.wait(300.0)
    for file in tmp_path.iterdir():
        file.unlink()
    with contextlib.suppress(StorageUnavailableError):
        evaluator.gather("ALL")  # it may have been stored in time
    assert job.output == {"x": 1}
    with pytest.raises(StorageUnavailableError, match="deleted"):
        evaluator.submit([{"x": 2}])
    with contextlib.suppress(StorageUnavailableError):
        evaluator.close()
    assert not path.exists()


def test_a_server_that_is_stopped_and_started_again(folder_for_servers: Path) -> None:
    for module in ("pgserver", "psycopg"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no PostgreSQL to test against: {module} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the wheel
        import pgserver

        def start() -> pgserver.PostgresServer:
            return pgserver.get_server(folder_for_servers / "away", cleanup_mode="stop")

        server = start()
        try:
            held = Held()
            url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
            with Evaluator.create(held, "thread", {"num_workers": 2, "storage": url}) as evaluator:
                evaluator.submit([{"x": 1}])
                assert gathered(evaluator) == [1]
                evaluator.submit([{"x": x} for x in range(2, 8)])
                server.cleanup()
                held.go.set()
                with pytest.raises(StorageUnavailableError):
                    evaluator.submit([{"x": 9}])
                with pytest.raises(StorageUnavailableError):
                    evaluator.gather("ALL")
                server = start()
                assert gathered(evaluator) == [2, 3, 4, 5, 6, 7]
                records = evaluator.storage.load_jobs(evaluator.search_id, states=[JobState.DONE])
                assert sorted(record.output for record in records) == [1, 2, 3, 4, 5, 6, 7]
        finally:
            server.cleanup()


def test_an_outage_is_told_of_once_by_what_nobody_waits_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_LONGEST_BACKOFF", 0.1)
    tries: list[float] = []

    class Away(MemoryStorage):
        durable = True

        def update_jobs(self, updates) -> None:  # type: ignore[no-untyped-def]
            tries.append(time.monotonic())
            if len(tries) <= 8:
                raise StorageUnavailableError("the disk is full")
            super().update_jobs(updates)

        end_jobs = Storage.end_jobs

    storage = Away()
    with (
        caplog.at_level(logging.WARNING, "evalkit"),
        Evaluator.create(echo, "thread", {"storage": storage}) as evaluator,
    ):
        evaluator.submit([{"x": 1}])
        wait_until(lambda: storage.count_jobs(evaluator.search_id).get(JobState.DONE) == 1)
    assert caplog.text.count("results are kept") == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
