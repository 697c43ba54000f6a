"""The pool under everything at once: take-backs, steals, cancels, crashes and large arguments, under a seed."""

from __future__ import annotations

import collections
import os
import random
import threading
import time
import warnings
from pathlib import Path

import pytest

from evalkit import Evaluator, Job, JobState, RunningJob


def note_and_work(job: RunningJob) -> int:
    """Note each run in a file, so that a second run of a job shows."""
    fd = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{job.id}\n".encode())
    os.close(fd)
    if job["seconds"] < 0:
        os._exit(5)
    time.sleep(job["seconds"])
    return job["number"]


def _parameters(rng: random.Random, log: Path, number: int) -> dict[str, object]:
    kind = rng.random()
    seconds = 0.0 if kind < 0.7 else rng.random() * 0.004 if kind < 0.97 else 0.05 if kind < 0.99 else -1.0
    padding = rng.choice([100_000, 1_000_000]) if kind < 0.01 else 0
    return {"log": str(log), "number": number, "seconds": seconds, "padding": b"x" * padding}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_job_runs_once_and_ends_once(tmp_path: Path, seed: int) -> None:
    log = tmp_path / "runs"
    log.touch()
    rng = random.Random(seed)
    submitted: list[Job] = []
    gathered: list[Job] = []
    over = threading.Event()

    def cancel_at_random() -> None:
        own = random.Random(-seed)
        while not over.wait(own.random() * 0.01):
            for job in own.sample(submitted, min(3, len(submitted))):
                job.cancel()

    with Evaluator.create(note_and_work, "process", {"num_workers": 3}) as evaluator:
        canceller = threading.Thread(target=cancel_at_random)
        canceller.start()
        try:
            for _ in range(15):
                count = rng.choice([1, 10, 200, 500])
                submitted += evaluator.submit([_parameters(rng, log, number) for number in range(count)])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of batches that are larger than what is out
                    gathered += evaluator.gather(rng.choice(["ALL", "BATCH"]), rng.choice([1, 5, 50]))
            gathered += evaluator.gather("ALL")
        finally:
            over.set()
            canceller.join()
    runs = collections.Counter(log.read_text().split())
    assert [job_id for job_id, count in runs.items() if count > 1] == []
    assert sorted(map(id, gathered)) == sorted(map(id, submitted))
    for job in gathered:
        if job.state is JobState.DONE:
            assert job.output == job.args["number"]
        elif job.state is JobState.FAILED:
            assert job.args["seconds"] < 0, job.error
        else:
            assert job.state is JobState.CANCELLED
