"""What a job took, as it is in its metadata."""

from __future__ import annotations

import time

import pytest

from evalkit import Evaluator, RunningJob


def _spend(job: RunningJob) -> None:
    """Spend so many seconds of CPU time, or sleep for so long, or return at once."""
    end = time.thread_time() + job.get("work", 0.0)
    while time.thread_time() < end:
        pass
    if "sleep" in job:
        time.sleep(job["sleep"])


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_the_cpu_time_of_a_long_run_is_its_own_among_brief_ones(method: str) -> None:
    brief = [{}] * 500
    with Evaluator.create(_spend, method, {"num_workers": 1}) as evaluator:
        jobs = evaluator.submit([*brief, {"work": 0.1}, *brief, {"sleep": 0.1}, *brief])
        evaluator.gather("ALL")
    worked, slept = jobs[500].metadata, jobs[1001].metadata
    assert 0.095 < worked["cpu_time"] < worked["duration"] + 0.01
    assert slept["duration"] >= 0.1
    assert slept["cpu_time"] < 0.05
    brief_jobs = [job for job in jobs if not job.args]
    assert all(0.0 <= job.metadata["cpu_time"] <= job.metadata["duration"] + 0.01 for job in brief_jobs)


def test_the_cpu_time_of_a_job_that_gathers_others_is_its_own() -> None:
    def function(job: RunningJob) -> None:
        if "inner" in job:
            return
        time.sleep(0.2)
        evaluator.submit([{"inner": 1}])
        evaluator.gather("BATCH", 1)

    with Evaluator.create(function, "serial") as evaluator:
        (outer,) = evaluator.submit([{}])
        evaluator.gather("ALL")
    assert outer.metadata["duration"] >= 0.2
    assert outer.metadata["cpu_time"] < 0.1
