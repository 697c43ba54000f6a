"""``job.cancel()`` says what it did, whatever else happens to the job at that moment."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evalkit import CancelOutcome, Evaluator, Job, JobCause, JobState, RetryPolicy, RunningJob
from evalkit.backends import Backend, Done, Lost, Started, Task
from evalkit.testing.backend_fixtures import BOUND, in_background


def _note(job: RunningJob) -> random.Random:
    """Add a line to the log: it runs."""
    with open(job["log"], "a") as log:
        log.write(f"{job.id}\n")
    return random.Random(f"{job.id} {job.attempt}")


def _live(job: RunningJob) -> int:
    chance = _note(job)
    way = chance.random()
    if way < 0.1 and job["may_die"]:
        os._exit(1)
    if way < 0.3:
        raise ValueError("by chance")
    end = time.monotonic() + chance.choice([0.0, 0.0, 0.001, 0.01])
    steps = 0
    while time.monotonic() < end and not job.stopped():
        job.record(step=steps)
        steps += 1
        time.sleep(0.001)
    return steps


async def _live_on_a_loop(job: RunningJob) -> None:
    await asyncio.sleep(_note(job).choice([0.0, 0.0, 0.001, 0.01]))


@pytest.mark.parametrize("resources", [None, {"gpu": [0, 1]}], ids=["", "resources"])
@pytest.mark.parametrize("backoff", [0.0, 0.005])
@pytest.mark.parametrize(
    ("method", "function"), [("serial", _live), ("serial", _live_on_a_loop), ("thread", _live), ("process", _live)]
)
def test_from_many_threads_at_any_moment(
    method: str, function: Any, backoff: float, resources: Any, tmp_path: Path
) -> None:
    """While jobs wait, run, are taken back, crash, wait for another attempt, have just ended, and were gathered."""
    log = tmp_path / "log"
    log.touch()
    jobs: list[Job] = []
    gathered: list[Job] = []
    outcomes: defaultdict[str, list[CancelOutcome]] = defaultdict(list)
    stop = threading.Event()
    settings = {
        "num_workers": 3,
        "retries": RetryPolicy(crash=5, exception=2, backoff=backoff),
        "grace": 0.3,
        "resources": resources,
    }

    def cancel_some(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.wait(chance.choice([0.0, 0.001, 0.003])):
            if jobs:
                job = jobs[-min(len(jobs), 1 + int(chance.expovariate(0.05)))]
                outcome = job.cancel()
                outcomes[job.id].append(outcome)
                assert outcome is CancelOutcome.REQUESTED or job.is_complete

    with Evaluator.create(function, method, settings) as evaluator:
        cancellers = [in_background(cancel_some, seed) for seed in range(4)]
        chance = random.Random(99)
        for _ in range(30):
            args = {"log": str(log), "may_die": method == "process"}
            jobs += evaluator.submit([args] * chance.choice([1, 5, 20]))
            gathered += in_background(evaluator.gather, "BATCH", 1).result(BOUND)
        gathered += in_background(evaluator.gather, "ALL").result(BOUND)
        stop.set()
        for canceller in cancellers:
            canceller.result(BOUND)
    assert Counter(job.id for job in gathered) == Counter(job.id for job in jobs)
    ran = set(log.read_text().split())
    for job in jobs:
        said = outcomes[job.id]
        assert said.count(CancelOutcome.CANCELLED) <= 1
        assert (job.state is JobState.CANCELLED) == any(one is not CancelOutcome.TOO_LATE for one in said), (job, said)
        if CancelOutcome.CANCELLED in said:
            assert job.attempts or job.id not in ran, "it was said that it never ran"


class _Turncoat(Backend):
    """What is to be cancelled starts just now, and ends at once or is lost."""

    loses = False

    def start(self, run_function: Any, emit: Any) -> None:
        self._emit = emit

    def dispatch(self, tasks: Sequence[Task]) -> None:
        pass

    def cancel(self, job_id: str, kill: bool) -> None:
        self._emit([Started(job_id, 5.0)])
        self._emit([Lost(job_id, "gone") if self.loses else Done(job_id, "late", (5.0, 6.0, None, None))])

    def stop(self, grace: float) -> None:
        pass


@pytest.mark.parametrize("loses", [False, True])
def test_a_job_that_starts_while_it_is_cancelled_was_not_kept_from_running(loses: bool) -> None:
    backend = _Turncoat(1)
    backend.loses = loses
    with Evaluator(_live, backend) as evaluator:
        (job,) = evaluator.submit([{}])
        assert job.cancel() is CancelOutcome.REQUESTED
        assert job.state is JobState.CANCELLED
        assert job.cancel() is CancelOutcome.TOO_LATE
        assert evaluator.gather("ALL") == [job]


def _record_and_hang(job: RunningJob) -> None:
    job.record(step=1)
    job.record(step=2)
    if job.attempt == 0:
        os._exit(1)
    job.record(step=3)
    Path(job["recorded"]).touch()
    time.sleep(600)


def test_what_all_attempts_recorded_comes_back_with_a_job_that_was_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with Evaluator.create(_record_and_hang, "process", {"retries": 1, "grace": 0.2, "storage": url}) as evaluator:
        (job,) = evaluator.submit([{"recorded": str(tmp_path / "recorded")}])
        gathering = in_background(evaluator.gather, "ALL")
        deadline = time.monotonic() + BOUND
        while not (tmp_path / "recorded").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert job.cancel() is CancelOutcome.REQUESTED
        assert job.cancel() is CancelOutcome.REQUESTED
        assert gathering.result(BOUND) == [job]
        assert job.state is JobState.CANCELLED
        assert job.records == [{"step": 1}, {"step": 2}, {"step": 1}, {"step": 2}, {"step": 3}]
        assert [one.cause for one in job.attempts] == [JobCause.CRASH]
        (record,) = evaluator.storage.load_jobs(evaluator.search_id)
        assert (record.state, record.records) == (JobState.CANCELLED, job.records)
        assert record.metadata["attempts"][0]["cause"] == "CRASH"
    assert job.cancel() is CancelOutcome.TOO_LATE


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_stop_that_leaves_alone_what_runs_knows_a_job_that_came_after_brief_ones(kind: str) -> None:
    started, go = threading.Event(), threading.Event()

    def run(job: RunningJob) -> Any:
        if job["x"] == 100:
            started.set()
            assert go.wait(BOUND)
        return job["x"]

    async def coroutine(job: RunningJob) -> Any:
        return run(job)

    with Evaluator.create(run if kind == "plain" else coroutine, "serial") as evaluator:
        jobs = evaluator.submit([{"x": x} for x in range(110)])
        gathered = in_background(evaluator.gather, "ALL")
        assert started.wait(BOUND)
        evaluator.stop("enough", running=False)
        go.set()
        gathered.result(BOUND)
    assert [job.state for job in jobs] == [JobState.DONE] * 101 + [JobState.CANCELLED] * 9
