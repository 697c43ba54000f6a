from __future__ import annotations

import json

import pytest

from evalkit.backends.serial import SerialBackend
from evalkit.cli.interrupts import Interrupts
from evalkit.cli.runner import Runner, RunOptions
from evalkit.cli.source import source_of
from evalkit.errors import StorageUnavailableError
from evalkit.storage import MemoryStorage, Storage

SOURCE = source_of(None, ["x=1,2,3"], None, [], None)


class Fickle(MemoryStorage):
    """Takes no result for so many calls."""

    durable = True

    def __init__(self, refusals: float) -> None:
        super().__init__()
        self.refusals = refusals

    def update_jobs(self, updates) -> None:
        if self.refusals > 0:
            self.refusals -= 1
            raise StorageUnavailableError("the disk is full")
        super().update_jobs(updates)

    end_jobs = Storage.end_jobs


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evalkit.engine.recorder._PATIENCE", 0.1)


def test_a_storage_that_comes_back_has_everything(capsys):
    storage = Fickle(refusals=6)
    options = RunOptions("t", "serial", search="s")
    assert Runner(options, lambda job: job["x"], SOURCE, storage, SerialBackend(1)).run(Interrupts()) == 0
    assert [record.output for record in storage.load_jobs("s")] == [1, 2, 3]
    err = capsys.readouterr().err
    assert "results are kept in memory" in err
    assert "the storage is back" in err


def test_results_that_the_storage_does_not_take_are_in_a_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("evalkit.cli.runner._PATIENCE", 0.3)
    options = RunOptions("t", "serial", search="s", output="o.csv")
    storage = Fickle(refusals=float("inf"))
    assert Runner(options, lambda job: job["x"], SOURCE, storage, SerialBackend(1)).run(Interrupts()) == 1
    (rescued,) = tmp_path.glob("evalkit-unsaved-s-*.jsonl")
    jobs = [json.loads(line) for line in rescued.read_text().splitlines()]
    err = capsys.readouterr().err
    assert "the disk is full" in err
    assert str(rescued) in err
    assert jobs
    assert all(job["state"] == "DONE" for job in jobs)
    assert "to resume:" in err
