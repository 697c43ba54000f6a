"""Resources: units that running jobs have to themselves. What holds on every backend is in the conformance suite."""

from __future__ import annotations

import csv
import os
import random
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from evalkit import Evaluator, Job, JobCause, JobState, RetryPolicy, RunningJob
from evalkit.callbacks import CSVCallback
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, in_background


@pytest.fixture
def files(tmp_path: Path) -> Any:
    files = Files(tmp_path)
    yield files
    files.release_all()


def _seen(job: RunningJob) -> dict[str, Any]:
    if job.get("meddle"):
        os.environ["CUDA_VISIBLE_DEVICES"] = "99"
        job.resources["gpu"] = "99"
        return {}
    if job.get("die"):
        os._exit(4)
    return {"pid": os.getpid(), "gpu": job.resources["gpu"], "visible": os.environ["CUDA_VISIBLE_DEVICES"]}


@pytest.mark.parametrize("options", [{}, {"max_jobs_per_worker": 4}])
def test_a_worker_process_keeps_to_its_units(options: dict[str, int]) -> None:
    """CUDA is set up once in a process: what is visible later makes no difference to it."""
    with Evaluator.create(
        _seen, "process", {"num_workers": 3, "resources": {"gpu": ["0", "1", "2", "3"]}} | options
    ) as evaluator:
        evaluator.submit([{"x": x, "die": x % 7 == 6} for x in range(60)])
        jobs = [job for job in in_background(evaluator.gather, "ALL").result(BOUND) if not job.args["die"]]
    units = defaultdict(set)
    for job in jobs:
        assert job.output["gpu"] == job.output["visible"] == job.resources["gpu"]
        units[job.output["pid"]].add(job.output["gpu"])
    assert {len(seen) for seen in units.values()} == {1}
    assert set().union(*units.values()) == {"0", "1", "2"}, "no more than there are workers"


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_what_a_job_makes_of_its_own_is_nothing_to_the_next(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with Evaluator.create(_seen, method, {"resources": {"gpu": [5]}}) as evaluator:
        meddling, job = evaluator.submit([{"meddle": True}, {}])
        in_background(evaluator.gather, "ALL").result(BOUND)
    assert meddling.metadata["resources"] == job.metadata["resources"] == {"gpu": "5"}
    assert job.output["gpu"] == "5"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5" or method == "thread"


def _write_down(job: RunningJob) -> str:
    """One line for each run, as it starts and as it ends: what it was told it has."""
    end = random.Random(f"{job['x']} {job.attempt}").choice(["return", "return", "raise", "die", "hang", "record"])
    line = f"{job.id} {job.attempt} {job.resources['gpu']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n"
    with open(job["log"], "a") as log:
        log.write(line)
    if end == "die" and job["may_die"]:
        os._exit(3)
    if end == "raise":
        raise ValueError
    if end == "record":
        job.record(gpu=job.resources["gpu"])
    stop = time.monotonic() + (30.0 if end == "hang" and job["may_die"] else 0.002)
    while time.monotonic() < stop:
        time.sleep(0.001)
    return job.resources["gpu"]


@pytest.mark.parametrize("method", ["thread", "process"])
def test_what_a_job_ran_on_is_what_it_records(method: str, tmp_path: Path) -> None:
    """Whatever happens to jobs meanwhile: retries, crashes, time limits, and cancels from other threads."""
    log = tmp_path / "log"
    settings = {
        "num_workers": 4,
        "resources": {"gpu": [0, 1, 2]},
        "retries": RetryPolicy(exception=3, crash=3, timeout=1),
        "job_timeout": 0.3,
        "grace": 0.2,
    }
    may_die = method == "process"
    with Evaluator.create(_write_down, method, settings) as evaluator:
        jobs = evaluator.submit([{"x": x, "log": str(log), "may_die": may_die} for x in range(40 if may_die else 300)])
        stop = threading.Event()

        def cancel_some() -> None:
            choice = random.Random(5)
            while not stop.wait(0.25 if may_die else 0.01):
                choice.choice(jobs).cancel()

        canceller = threading.Thread(target=cancel_some)
        canceller.start()
        try:
            in_background(evaluator.gather, "ALL").result(2 * BOUND)
        finally:
            stop.set()
            canceller.join()
    ran = {}
    for line in log.read_text().splitlines():
        job_id, attempt, gpu, visible = line.split()
        assert visible == gpu or method == "thread"
        assert ran.setdefault((job_id, int(attempt)), gpu) == gpu
    recorded = {}
    for job in jobs:
        recorded |= {(job.id, one.attempt): (one.resources or {}).get("gpu") for one in job.attempts}
        if "resources" in job.metadata:
            recorded[job.id, job.attempt] = job.metadata["resources"]["gpu"]
    assert ran
    assert {run: recorded.get(run) for run in ran} == ran
    assert [job.output for job in jobs if job.is_success] == [job.resources["gpu"] for job in jobs if job.is_success]


def _ignore(job: RunningJob) -> None:
    Path(job["started"]).touch()
    while not os.path.exists(job["release"]):
        time.sleep(0.005)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_it_is_said_when_all_units_are_with_abandoned_runs(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"resources": {"gpu": [0]}, "job_timeout": 0.1, "grace": 0.1, "retries": RetryPolicy(timeout=1)}
    with Evaluator.create(_ignore, "thread", settings) as evaluator:
        (job,) = evaluator.submit([files.holder("a")])
        eventually(lambda: "all of which are held" in caplog.text, "the warning")
        assert (job.state, job.attempt) == (JobState.QUEUED, 1), "the first attempt is not over"
        assert job.id in caplog.text
        files.release("a")
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [job]
        assert (job.state, job.attempt) == (JobState.DONE, 1)
        assert [one.cause for one in job.attempts] == [JobCause.TIMEOUT]


def _resources(job: RunningJob) -> dict[str, str]:
    return job.resources


async def _wait_and_see(job: RunningJob) -> dict[str, str]:
    return job.resources


@pytest.mark.parametrize("function", [_resources, _wait_and_see])
def test_the_scarcest_kind_counts_and_numbers_are_read_as_text(function: Any) -> None:
    settings = {"num_workers": 4, "resources": {"gpu": range(4), "seat": ["a"]}}
    with Evaluator.create(function, "serial", settings) as evaluator:
        assert evaluator.to_json()["resources"] == {"gpu": ["0", "1", "2", "3"], "seat": ["a"]}
        evaluator.submit([{}, {}])
        assert [job.output for job in evaluator.gather("ALL")] == [{"gpu": "0", "seat": "a"}] * 2


@pytest.mark.parametrize("resources", [None, {}])
def test_without_resources_there_are_none(resources: Any) -> None:
    with Evaluator.create(_resources, "serial", {"resources": resources}) as evaluator:
        evaluator.submit([{}])
        (job,) = evaluator.gather("ALL")
        assert (job.output, job.resources, evaluator.to_json()["resources"]) == ({}, {}, None)
        assert "resources" not in job.metadata


def test_a_string_of_units_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"write \['0', '1'\]"):
        Evaluator.create(_resources, "serial", {"resources": {"gpu": "0, 1"}})


def _with_metadata(job: RunningJob) -> dict[str, Any]:
    return {"objective": 1.0, "metadata": {"resources": "mine", "layers": 3}}


def test_they_are_stored_and_in_the_table(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    table = tmp_path / "results.csv"
    settings = {"resources": {"gpu": ["0"]}, "storage": url, "callbacks": [CSVCallback(table)]}
    with Evaluator.create(_with_metadata, "serial", settings) as evaluator:
        (job,) = evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        (record,) = evaluator.storage.load_jobs(evaluator.search_id)
        assert record.metadata["resources"] == {"gpu": "0"}, "what evalkit measured, not what a run returns"
        with Evaluator.create(_resources, "serial", {"storage": url, "search_id": evaluator.search_id}) as other:
            (seen,) = other.gather_other_jobs_done()
            assert (seen.resources, seen.metadata["layers"]) == ({"gpu": "0"}, 3)
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert row["m:resources"] == '{"gpu": "0"}'
    assert isinstance(job, Job)
