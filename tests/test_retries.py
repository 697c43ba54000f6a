"""Retries by cause, what they leave behind, and what they do not count."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evalkit import ErrorInfo, Evaluator, Job, JobCause, JobState, RetryPolicy, RunningJob
from evalkit.attempts import Attempt
from evalkit.backends import Backend, Done, Failed, Lost, Started, Task, WorkerIdentity
from evalkit.engine.retry import Retries
from evalkit.plugins import plugins
from evalkit.testing.backend_fixtures import BOUND, in_background


def _third_time_lucky(job: RunningJob) -> int:
    if job.attempt == 0:
        os._exit(3)
    if job.attempt == 1:
        raise ValueError("x" * 10_000)
    return job.attempt


def test_each_attempt_is_kept_with_what_is_known_of_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    settings = {"retries": RetryPolicy(crash=1, exception=1), "storage": url}
    with Evaluator.create(_third_time_lucky, "process", settings) as evaluator:
        (job,) = evaluator.submit([{}])
        assert job.attempts == []
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.output, job.attempt) == (JobState.DONE, 2, 2)
        crash, exception = job.attempts
        assert (crash.attempt, crash.cause, crash.error) == (0, JobCause.CRASH, "WorkerDied")
        assert "code 3" in crash.message
        assert (exception.attempt, exception.cause, exception.error) == (1, JobCause.EXCEPTION, "ValueError")
        assert exception.message == "x" * 499 + "…"
        times = []
        for attempt in (crash, exception):
            assert (attempt.host, attempt.worker is not None) == (socket.gethostname(), True)
            assert attempt.timestamp_start is not None
            assert attempt.duration is not None
            times += [attempt.timestamp_start, attempt.timestamp_start + attempt.duration]
        assert crash.pid != exception.pid, "the worker died"
        times += [job.metadata["timestamp_start"]]
        assert times == sorted(times)
        search_id = evaluator.search_id
    with closing(plugins().open_storage(url)) as storage:
        (record,) = storage.load_jobs(search_id)
    assert record.metadata["attempts"] == [crash.to_json(), exception.to_json()]
    assert [Attempt.of(values) for values in record.metadata["attempts"]] == [crash, exception]
    with Evaluator.create(_third_time_lucky, "serial", {"storage": url, "search_id": search_id}) as other:
        (seen,) = other.gather_other_jobs_done()
    assert seen.attempts == [crash, exception]


def test_attempts_are_stored_before_the_job_ends(tmp_path: Path) -> None:
    """So that they are there after the program was killed."""
    settings = {"retries": RetryPolicy(exception=1, backoff=3600.0), "storage": f"sqlite:///{tmp_path}/study.db"}
    with Evaluator.create(_always_fail, "thread", settings) as evaluator:
        (job,) = evaluator.submit([{}])
        while not job.attempts:
            assert not job.wait(0.01)
        while not (record := evaluator.storage.load_jobs(evaluator.search_id)[0]).metadata.get("attempts"):
            assert not job.wait(0.01)
        assert (record.state, record.attempt, record.metadata["attempts"][0]["cause"]) == (
            JobState.QUEUED,
            1,
            "EXCEPTION",
        )
        assert job.cancel() == "CANCELLED", "it waits for its backoff"
        assert evaluator.gather("ALL") == [job]
        assert [one.cause for one in job.attempts] == [JobCause.EXCEPTION]


def _always_fail(job: RunningJob) -> None:
    raise ValueError("always")


def _returns_metadata(job: RunningJob) -> dict[str, Any]:
    return {"objective": 1, "metadata": {"attempts": [job["odd"]]}}


@pytest.mark.parametrize("odd", [1, {}, {"attempt": 0}, {"attempt": 0, "cause": "WHIM", "error": "", "message": ""}])
def test_metadata_of_that_name_that_a_function_returns_harms_nothing(odd: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with Evaluator.create(_returns_metadata, "serial", {"storage": url}) as evaluator:
        evaluator.submit([{"odd": odd}])
        (job,) = evaluator.gather("ALL")
        assert (job.attempts, job.metadata["attempts"]) == ([], [odd])
        with Evaluator.create(_returns_metadata, "serial", {"storage": url, "search_id": evaluator.search_id}) as other:
            (seen,) = other.gather_other_jobs_done()
            assert (seen.attempts, seen.metadata["attempts"]) == ([], [odd])


class _Scripted(Backend):
    """Each run ends at once, as the script says for its attempt; ``Lost`` where the script is over."""

    script: Sequence[JobCause | None] = ()

    def start(self, run_function: Any, emit: Any) -> None:
        self._emit = emit
        self.runs = 0

    def dispatch(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self.runs += 1
            worker = WorkerIdentity("node-7", 12, "w")
            self._emit([Started(task.id, 100.0, worker)])
            what: JobCause | str | None = self.script[task.attempt] if task.attempt < len(self.script) else "lost"
            if what is None:
                self._emit([Done(task.id, "done", (100.0, 100.5, None, None), worker)])
            elif what == "lost":
                self._emit([Lost(task.id, "node-7 is gone")])
            else:
                self._emit([Failed(task.id, JobCause(what), ErrorInfo("Scripted", what), None, worker)])

    def cancel(self, job_id: str, kill: bool) -> None:
        pass

    def stop(self, grace: float) -> None:
        pass


def _run_script(script: Sequence[Any], retries: int | RetryPolicy) -> Job:
    backend = _Scripted(1)
    backend.script = script
    with Evaluator(_always_fail, backend, retries=retries) as evaluator:
        evaluator.submit([{}])
        (job,) = in_background(evaluator.gather, "ALL").result(BOUND)
        assert not evaluator._scheduler._retries.spent, "what is known of it is forgotten"
        assert job.attempt + 1 == backend.runs
        return job  # type: ignore[no-any-return]


def test_losses_by_the_machine_use_up_no_retry() -> None:
    crash = JobCause.CRASH
    job = _run_script(["lost"] * 4 + [crash, "lost", "lost", crash, "lost", None], retries=2)
    assert (job.state, job.output) == (JobState.DONE, "done")
    causes = [one.cause for one in job.attempts]
    assert causes == [JobCause.LOST] * 4 + [crash] + [JobCause.LOST] * 2 + [crash, JobCause.LOST]
    assert (job.attempts[0].error, job.attempts[0].message, job.attempts[0].host) == (
        "JobLost",
        "node-7 is gone",
        "node-7",
    )


@pytest.mark.parametrize(("retries", "attempts"), [(0, 10), (2, 12)])
def test_a_job_that_is_lost_ever_again_fails_in_the_end(retries: int, attempts: int) -> None:
    job = _run_script([], retries)
    assert (job.state, job.cause, job.attempt) == (JobState.FAILED, JobCause.LOST, attempts)
    assert str(job.error) == "JobLost: node-7 is gone"


def test_each_cause_has_retries_of_its_own() -> None:
    script = [JobCause.EXCEPTION, JobCause.CRASH, JobCause.MEMORY, JobCause.CRASH, JobCause.EXCEPTION]
    job = _run_script(script, RetryPolicy(exception=1, crash=2, memory=1))
    assert (job.state, job.cause, job.attempt) == (JobState.FAILED, JobCause.EXCEPTION, 4)
    assert [one.cause for one in job.attempts] == script[:4]


def test_no_limit_of_retries() -> None:
    job = _run_script([JobCause.EXCEPTION] * 300 + [None], RetryPolicy(exception=math.inf))
    assert (job.state, len(job.attempts)) == (JobState.DONE, 300)


def test_the_backoff_doubles_with_a_random_part_and_is_bounded() -> None:
    policy = RetryPolicy(exception=math.inf, backoff=2.0)
    for failures, least in ((1, 2.0), (2, 4.0), (3, 8.0), (9, 300.0), (5000, 300.0)):
        delays = {policy.delay(failures) for _ in range(100)}
        assert least <= min(delays) <= max(delays) <= 1.25 * least
        assert len(delays) > 1, "jobs that failed together would come back together"
    assert RetryPolicy(backoff=1000.0).delay(5) >= 1000.0
    assert RetryPolicy(exception=1).delay(1) == 0.0


def test_a_loss_does_not_lengthen_the_backoff() -> None:
    retries = Retries(RetryPolicy(crash=2, backoff=1.0))
    assert retries.after_loss("a")
    assert retries.after_loss("a")
    assert 1.0 <= (retries.after("a", JobCause.CRASH) or 0.0) <= 1.25


@pytest.mark.parametrize(
    "numbers",
    [
        {"crash": -1},
        {"exception": 1.5},
        {"timeout": math.nan},
        {"memory": True},
        {"lost": "2"},
        {"backoff": -0.1},
        {"backoff": math.inf},
        {"backoff": math.nan},
        {"backoff": "1"},
    ],
)
def test_what_makes_no_sense_is_refused(numbers: dict[str, Any]) -> None:
    (name,) = numbers
    with pytest.raises(ValueError, match=f"{name}="):
        RetryPolicy(**numbers)
