"""A value whose methods raise costs itself: the other jobs, the search and the files of results go on."""

from __future__ import annotations

import csv
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from hostile_values import KINDS, PLACES, Proxy, returns

from evalkit import Evaluator, JobState
from evalkit.callbacks import CSVCallback, EarlyStopping, LoggerCallback, TqdmCallback
from evalkit.cli.output import JSONLinesCallback, OutputCallback
from evalkit.cli.watch import Watch
from evalkit.storage import UnstorableValue, codec

csv.field_size_limit(1 << 30)


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/study.db"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_every_kind_of_value(
    method: str, place: str, storage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table, lines = tmp_path / "results.csv", tmp_path / "results.jsonl"
    callbacks = [
        CSVCallback(table),
        OutputCallback(JSONLinesCallback(lines)),
        LoggerCallback(),
        TqdmCallback(),
        Watch(minimize=False),
        EarlyStopping(patience=10_000, threshold=1e9),
    ]
    looks = (repr, lambda job: job.objective, lambda job: job.objective_failed, lambda job: job.metadata)
    parameters = [{"kind": kind, "place": place} for name in KINDS for kind in (name, "good")]
    options = {"storage": storage, "callbacks": callbacks, "num_workers": 2}
    with caplog.at_level(logging.WARNING), Evaluator.create(returns, method, options) as evaluator:
        evaluator.submit(parameters)
        jobs = evaluator.gather("ALL")
        records = evaluator.storage.load_jobs(evaluator.search_id)
    assert [job.args for job in jobs] == parameters
    assert all(job.state is JobState.DONE for job in jobs[1::2])
    assert all(job.state is JobState.DONE or (method == "process" and job.error is not None) for job in jobs)
    assert [record.state for record in records] == [job.state for job in jobs]
    assert [record.output for record in records[1::2]] == [1.0] * len(KINDS)
    for record, job in zip(records, jobs, strict=True):
        if place == "part" and job.state is JobState.DONE and record.args["kind"] != "good":
            assert (record.output["objective"], record.output["good"], record.output["list"][1]) == (1.0, (1, [2]), 3)
            assert record.objective == 1.0
        if place == "record" and record.args["kind"] != "good" and record.records:
            assert "evalkit_error" in record.records[0] or record.records[0]["good"] == 1
    assert sorted(int(row["job_id"]) for row in rows_of(table)) == [job.number for job in jobs]
    assert len([json.loads(line) for line in lines.read_text().splitlines()]) == len(jobs)
    refused = [one.getMessage() for one in caplog.records if one.name == "evalkit"]
    assert refused == []
    for job in jobs:
        for look in looks:
            look(job)


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_every_kind_of_argument(method: str, storage: str) -> None:
    made = [make() for make in KINDS.values()]
    with Evaluator.create(_is_given, method, {"storage": storage, "num_workers": 2}) as evaluator:
        evaluator.submit([args for value in made for args in ({"good": 1, "bad": value, "list": [value]}, {"good": 2})])
        jobs = evaluator.gather("ALL")
        records = evaluator.storage.load_jobs(evaluator.search_id)
    assert [job.output for job in jobs[1::2]] == [2] * len(made)
    assert all(job.output == 1 or (method == "process" and job.state is JobState.FAILED) for job in jobs[::2])
    assert [record.args["good"] for record in records] == [1, 2] * len(made)


def _is_given(job: Any) -> Any:
    return job["good"]


def test_what_is_stored_says_what_it_was(tmp_path: Path) -> None:
    def run(job: Any) -> Any:
        job.record(step=1, bad=Proxy())
        return {"objective": 0.5, "metadata": {"seed": 7, "bad": Proxy()}, "weights": (1.0, Proxy())}

    with Evaluator.create(run, "thread", {"storage": f"sqlite:///{tmp_path}/study.db"}) as evaluator:
        evaluator.submit([{"x": 1, "bad": Proxy()}])
        (job,) = evaluator.gather("ALL")
        (record,) = evaluator.storage.load_jobs(evaluator.search_id)
    marker = record.output["weights"][1]
    assert type(marker) is UnstorableValue
    assert marker.type_name == "hostile_values.Proxy"
    assert "Proxy object at" in marker.text
    assert marker.error == "RuntimeError: working outside of context"
    assert record.args == {"x": 1, "bad": marker} or record.args["bad"].error == marker.error
    assert record.output["objective"] == job.objective == 0.5
    assert record.metadata["seed"] == 7
    assert record.metadata["bad"].error == marker.error
    assert record.records[0]["step"] == 1
    assert record.records[0]["bad"].error == marker.error
    assert type(job.output["weights"][1]) is Proxy  # in hand it is as it was


@pytest.mark.parametrize("method", ["serial", "process"])
def test_a_run_function_may_hold_a_class_of_the_script_that_has_a_class_of_its_own(method: str) -> None:
    """As a proxy has; the class travels by value, since it cannot be imported."""

    class Proxy:
        @property
        def __class__(self) -> type:
            raise RuntimeError("working outside of context")

    with Evaluator.create(lambda job: Proxy() if job["x"] else 1, method) as evaluator:
        good, bad = evaluator.submit([{"x": 0}, {"x": 1}])
        evaluator.gather("ALL")
    assert good.is_success, good.error
    assert bad.is_complete
    if bad.is_failed:
        assert "working outside of context" in bad.error.message


class _NeverPickles:
    def __reduce__(self) -> Any:
        while True:
            time.sleep(0.01)


@pytest.mark.parametrize("method", ["serial", "thread"])
def test_an_object_whose_methods_never_return_is_left_out(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "LONGEST", 0.2)

    def run(job: Any) -> Any:
        return {"objective": 2.5, "beside": (1, 2), "bad": _NeverPickles()} if job["x"] else 1

    with Evaluator.create(run, method, {"storage": f"sqlite:///{tmp_path}/study.db"}) as evaluator:
        jobs = evaluator.submit([{"x": 0}, {"x": 1}, {"x": 0}])
        assert evaluator.gather("ALL") == jobs
        records = evaluator.storage.load_jobs(evaluator.search_id)
    assert [record.state for record in records] == [JobState.DONE] * 3
    stored = records[1].output
    assert (stored["objective"], stored["beside"]) == (2.5, (1, 2))
    assert type(stored["bad"]) is UnstorableValue
    assert "longer than 0.2 s" in stored["bad"].error
