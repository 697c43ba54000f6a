"""Real threads: some submit, others gather, cancel and close, and every count is exact."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from bounds import seeds

from evalkit import Callback, Evaluator, Job, RetryPolicy, RunningJob
from evalkit.errors import EvaluatorClosedError, SearchStoppedError
from evalkit.testing.backend_fixtures import BOUND, in_background
from evalkit.testing.together import in_threads


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Tally(Callback):
    def __init__(self) -> None:
        self.told: dict[str, list[str]] = {}
        self.closed = 0

    def on_launch(self, job: Job) -> None:
        self.told.setdefault(job.id, []).append("launch")

    def on_done(self, job: Job) -> None:
        self.told[job.id].append("done")

    def on_gather(self, jobs: Any) -> None:
        for job in jobs:
            self.told[job.id].append("gather")

    def on_close(self) -> None:
        self.closed += 1


def work(job: RunningJob) -> Any:
    if job["x"] % 7 == 0 and job.attempt == 0:
        raise ValueError("the first time")
    if job["x"] % 11 == 0:
        job.record(x=job["x"])
    return job["x"]


def _use(evaluator: Evaluator, submitters: int, gatherers: int, n: int, seed: int) -> list[list[Job]]:
    """Submit, gather and cancel from many threads at once; what each gatherer got."""
    submitted: list[Job] = []

    def submit(rng: random.Random) -> list[Job]:
        left = n
        while left:
            size = min(left, rng.randint(1, 9))
            args = [{"x": rng.randrange(1000)} for _ in range(size)]
            submitted.extend(evaluator.submit(iter(args) if rng.random() < 0.3 else args))
            left -= size
            if rng.random() < 0.3:
                rng.choice(submitted).cancel()
        return []

    def gather(rng: random.Random) -> list[Job]:
        mine: list[Job] = []
        while True:
            all_are_in = len(submitted) == n * submitters
            jobs = evaluator.gather("BATCH", 1) if rng.random() < 0.8 else evaluator.gather("ALL")
            mine += jobs
            if all_are_in and not jobs:
                return mine

    def use(i: int) -> list[Job]:
        rng = random.Random(f"{seed} {i}")
        return submit(rng) if i < submitters else gather(rng)

    return in_threads(submitters + gatherers, use)


@pytest.mark.parametrize("seed", seeds(10))
@pytest.mark.parametrize("method", ["thread", "serial"])
def test_every_job_is_gathered_once_whoever_gathers(method: str, seed: int) -> None:
    rng = random.Random(seed)
    submitters, gatherers, workers = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 4)
    tally = Tally()
    kwargs = {"num_workers": workers, "callbacks": [tally], "retries": RetryPolicy(exception=1)}
    before = set(threading.enumerate())
    with Evaluator.create(work, method, kwargs) as evaluator:
        each = _use(evaluator, submitters, gatherers, 60, seed)
        gathered = [job for jobs in each for job in jobs]
        total = 60 * submitters
        assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered == total
        assert Counter(job.id for job in gathered) == dict.fromkeys((f"0.{i}" for i in range(total)), 1)
        for job in gathered:
            assert job.state in ("DONE", "CANCELLED")
            assert job.state == "CANCELLED" or (job.output, job.attempt) == (job.args["x"], job.args["x"] % 7 == 0)
        records = {record.id: record for record in evaluator.storage.load_jobs("0")}
        for job in gathered:
            record = records[job.id]
            assert (record.state, record.output, record.attempt) == (job.state, job.output, job.attempt)
        assert evaluator.gather("ALL") == []
    assert tally.closed == 1
    assert all(told == ["launch", "done", "gather"] for told in tally.told.values())
    assert len(tally.told) == total
    assert not [
        thread for thread in threading.enumerate() if thread not in before and thread.name != "suite-background"
    ]


@pytest.mark.parametrize("seed", seeds(15))
@pytest.mark.parametrize("method", ["thread", "serial"])
def test_a_close_at_any_time_lets_everybody_go(method: str, seed: int) -> None:
    rng = random.Random(seed)
    turns, workers = rng.randint(0, 200), rng.randint(1, 3)
    tally = Tally()
    evaluator = Evaluator.create(work, method, {"num_workers": workers, "callbacks": [tally], "grace": 1.0})
    jobs: list[Job] = []
    gathered: list[Job] = []
    closing = threading.Event()

    def submit() -> None:
        try:
            while True:
                jobs.extend(evaluator.submit([{"x": rng.randrange(1000)} for _ in range(rng.randint(1, 9))]))
                if len(jobs) >= turns:
                    closing.set()
        except (EvaluatorClosedError, SearchStoppedError):
            pass

    def gather() -> None:
        try:
            while True:
                gathered.extend(evaluator.gather("BATCH", 1))
        except EvaluatorClosedError:
            pass

    threads = [in_background(submit), in_background(gather), in_background(gather)]
    assert closing.wait(BOUND)
    cancelled = in_background(evaluator.close).result(BOUND)
    for thread in threads:
        thread.result(BOUND)
    assert all(job.is_complete for job in jobs)
    assert all(job.is_complete for job in cancelled)
    assert len({job.id for job in gathered}) == len(gathered)
    assert evaluator.num_jobs_gathered == len(gathered)
    assert evaluator.num_jobs_submitted == len(jobs)
    assert tally.closed == 1
    for told in tally.told.values():
        assert told in (["launch", "done"], ["launch", "done", "gather"])
    records = evaluator.storage.load_jobs("0")
    assert all(record.is_complete for record in records)
    assert len(records) >= len(jobs)
