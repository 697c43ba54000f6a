"""``job_timeout`` is a limit on the run: not on how soon the program hears of its end."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evalkit import Evaluator, JobCause, JobState, RetryPolicy
from evalkit.backends import Backend, Done, Event, Failed, Started, Task
from evalkit.engine.clock import Clock
from evalkit.engine.endings import Endings
from evalkit.job import ErrorInfo, Job
from evalkit.testing.backend_fixtures import BOUND, eventually, in_background

_STOPPED = """
    import json, os, subprocess, sys, time
    from evalkit import Evaluator

    def run(job):
        time.sleep(job["seconds"])
        return {"objective": 1.0, "metadata": {"type": int}}

    if __name__ == "__main__":
        with Evaluator.create(run, sys.argv[1], {"num_workers": 2, "job_timeout": 1.0, "grace": 0.5}) as evaluator:
            evaluator.submit([{"seconds": 0.0}] * 2)
            evaluator.gather("ALL")
            jobs = evaluator.submit([{"seconds": 0.3}, {"seconds": 60.0}])
            time.sleep(0.1)
            subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep 2; kill -CONT {os.getpid()}"])
            evaluator.gather("ALL")
            print(json.dumps([(job.state, job.cause) for job in jobs]))
"""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["thread", "process"])
def test_a_program_that_was_stopped_fails_only_what_took_too_long(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_STOPPED))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), method],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [["DONE", None], ["FAILED", "TIMEOUT"]]


def test_a_job_that_hangs_fails_though_the_program_is_held_up_again_and_again() -> None:
    with Evaluator.create(_hang, "process", {"job_timeout": 0.5, "grace": 0.5}) as evaluator:
        (job,) = evaluator.submit([{}])
        deadline = time.monotonic() + BOUND
        while not job.wait(0.1) and time.monotonic() < deadline:
            ctypes.PyDLL(None).usleep(400_000)
        assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)


def _hang(job: object) -> None:
    time.sleep(10 * BOUND)


class _Told(Backend):
    """Says of its one job what the test says."""

    def start(self, run_function, emit) -> None:
        self.emit = emit
        self.tasks: list[Task] = []
        self.asked: list[bool] = []

    def dispatch(self, tasks: Sequence[Task]) -> None:
        self.tasks += tasks

    def cancel(self, job_id: str, kill: bool) -> None:
        self.asked.append(kill)

    def stop(self, grace: float) -> None:
        pass


def _end_when_asked(end: Callable[[str, float], Event]) -> Job:
    """Have a job start, and end as ``end(job_id, start)`` says once it was asked to stop for its limit."""
    backend = _Told(1)
    with Evaluator(_hang, backend, job_timeout=0.2, grace=BOUND) as evaluator:
        (job,) = evaluator.submit([{}])
        start = time.time()
        backend.emit([Started(job.id, start)])
        eventually(lambda: backend.asked, "the request to stop")
        backend.emit([end(job.id, start)])
        in_background(evaluator.gather, "ALL").result(BOUND)
    return job


@pytest.mark.parametrize(
    ("took", "state", "cause"), [(0.1, JobState.DONE, None), (9.0, JobState.FAILED, JobCause.TIMEOUT)]
)
def test_a_run_that_ended_in_time_counts_though_it_was_asked_to_stop(
    took: float, state: JobState, cause: JobCause | None
) -> None:
    job = _end_when_asked(lambda job_id, start: Done(job_id, "output", (start, start + took, None, None)))
    assert (job.state, job.cause, job.output) == (state, cause, "output")


def test_a_run_that_began_late_and_heeded_the_request_is_out_of_time() -> None:
    """It is shorter than the limit, since it began a while after that was told, and what it returns may be a part."""
    job = _end_when_asked(lambda job_id, start: Done(job_id, "a part", (start + 0.15, start + 0.25, None, None)))
    assert job.cause is JobCause.TIMEOUT


def test_an_exception_that_came_in_time_is_told_as_that() -> None:
    error = ErrorInfo("ValueError", "no")
    job = _end_when_asked(
        lambda job_id, start: Failed(job_id, JobCause.EXCEPTION, error, (start, start + 0.1, None, None))
    )
    assert (job.cause, job.error) == (JobCause.EXCEPTION, error)


def test_the_time_counts_from_when_the_worker_says_that_the_job_started() -> None:
    backend = _Told(1)
    with Evaluator(_hang, backend, job_timeout=BOUND, grace=BOUND) as evaluator:
        (job,) = evaluator.submit([{}])
        backend.emit([Started(job.id, time.time())])
        assert not backend.asked
        backend.emit([Started(job.id, time.time(), None, time.monotonic() - 2 * BOUND)])
        eventually(lambda: backend.asked, "the request to stop")
        backend.emit([Done(job.id, 1)])
    assert job.cause is JobCause.TIMEOUT


def test_an_attempt_is_not_asked_to_stop_though_the_one_before_was_out_of_time() -> None:
    """Two jobs are out of time at once; the second ends while the first is asked to stop."""

    class Ends(_Told):
        def cancel(self, job_id: str, kill: bool) -> None:
            super().cancel(job_id, kill)
            if job_id == first.id and len(self.tasks) == 2:
                self.emit([Failed(second.id, JobCause.EXCEPTION, ErrorInfo("ValueError", "no"))])

    backend = Ends(2)
    with Evaluator(_hang, backend, job_timeout=0.3, grace=BOUND, retries=RetryPolicy(timeout=1)) as evaluator:
        first, second = evaluator.submit([{}, {}])
        start = time.time()
        backend.emit([Started(job.id, start, None, time.monotonic()) for job in (first, second)])
        eventually(lambda: len(backend.tasks) == 3, "the next attempt of the second")
        backend.emit([Done(job.id, 2, (start, start + 0.1, None, None)) for job in (first, second)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert backend.asked == [False]
    assert (second.state, second.attempt, second.output) == (JobState.DONE, 1, 2)


def test_a_check_of_the_limits_that_was_overtaken_is_not_repeated() -> None:
    """Each run has two limits, of which the second may be the earlier: so there are more checks than needed."""

    class Counts(Clock):
        checks = 0

        def judge_later(self, delay: float, function: Callable[..., None], *args: Any) -> None:
            self.checks += 1
            super().judge_later(delay, function, *args)

    clock, lock, measured = Counts(), threading.Lock(), (0.0, 0.0, None, None)
    endings = Endings(_Told(1), clock, lock, job_timeout=1.0, output_timeout=0.005, grace=BOUND)
    lasting, short = Job("lasting", {}), Job("short", {})
    with contextlib.closing(clock):
        endings.started(lasting, None)
        for _ in range(30):
            with lock:
                endings.ended(short, measured)
                endings.arrived(short, measured)
            time.sleep(0.01)
        with lock:
            endings.started(lasting, None)
        clock.checks = 0
        time.sleep(1.2)  # the first limit of the lasting one has passed, and was checked
        assert clock.checks < 10
