"""What the property tests found, boiled down: each of these was wrong once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from evalkit import ErrorInfo, Evaluator, JobCause, JobState, RetryPolicy
from evalkit.backends import Done, Failed, Lost

from faketime import FakeTime, fake_time
from scripted import WORKER, ScriptedBackend

Make = Callable[..., tuple[Evaluator, ScriptedBackend]]


@pytest.fixture
def time() -> Iterator[FakeTime]:
    with fake_time() as time:
        yield time


@pytest.fixture
def make(time: FakeTime) -> Iterator[Make]:
    """An evaluator, and the backend that does what the test says."""
    made: list[Evaluator] = []

    def make(deep: int = 0, **kwargs: Any) -> tuple[Evaluator, ScriptedBackend]:
        backend = ScriptedBackend(1, time, inline=False, prompt=True, deep=deep)
        made.append(Evaluator(lambda job: None, backend, **kwargs))
        return made[-1], backend

    yield make
    for evaluator in made:
        evaluator.close()


def start(backend: ScriptedBackend) -> str:
    """Let the next job start; its id."""
    run = backend.waiting()[0]
    backend.send(backend.started(run))
    return run.task.id


def test_a_loss_of_the_machine_uses_up_no_retry_of_the_job(make: Make) -> None:
    evaluator, backend = make(retries=RetryPolicy(lost=1))
    (job,) = evaluator.submit([{}])
    for _ in range(3):
        backend.send(Lost(start(backend), "the node is gone"))
    backend.send(Failed(start(backend), JobCause.LOST, ErrorInfo("Gone", "again"), None, WORKER))
    assert job.state is JobState.QUEUED
    backend.send(Failed(start(backend), JobCause.LOST, ErrorInfo("Gone", "again"), None, WORKER))
    assert (job.state, job.cause, job.attempt) == (JobState.FAILED, JobCause.LOST, 4)


@pytest.mark.parametrize("end", ["cancel", "stop", "close"])
def test_a_job_past_its_time_that_is_cancelled_gets_no_other_attempt(end: str, make: Make, time: FakeTime) -> None:
    evaluator, backend = make(retries=RetryPolicy(timeout=1), job_timeout=1.0)
    (job,) = evaluator.submit([{}])
    job_id = start(backend)
    time.advance(1.0)
    if end == "close":
        assert evaluator.close() == [job]
    elif end == "cancel":
        assert job.cancel() == "REQUESTED"
    else:
        evaluator.stop("enough")
    if end != "close":
        backend.send(Done(job_id, "what it had"))
        assert job.output == "what it had"
    assert job.state is JobState.CANCELLED
    assert not backend.runs


def test_each_attempt_has_a_grace_of_its_own(make: Make, time: FakeTime) -> None:
    evaluator, backend = make(retries=RetryPolicy(timeout=1), job_timeout=0.5, grace=2.0)
    (job,) = evaluator.submit([{}])
    job_id = start(backend)
    time.advance(0.6)  # asked to stop at 0.5, to be killed at 1.5
    backend.send(Done(job_id, 1))
    start(backend)
    time.advance(0.95)  # asked at 1.1, to be killed at 2.1
    assert job.state is JobState.RUNNING
    backend.send(Done(job_id, 2))
    assert (job.state, job.cause, job.output) == (JobState.FAILED, JobCause.TIMEOUT, 2)


def test_a_job_past_its_time_whose_machine_is_lost_is_retried_as_one_past_its_time(make: Make, time: FakeTime) -> None:
    evaluator, backend = make(retries=RetryPolicy(timeout=1), job_timeout=1.0)
    (job,) = evaluator.submit([{}])
    for state in (JobState.QUEUED, JobState.FAILED):
        job_id = start(backend)
        time.advance(1.0)
        backend.send(Lost(job_id, "the node is gone"))
        assert job.state is state
    assert (job.cause, job.attempt) == (JobCause.TIMEOUT, 1)


@pytest.mark.parametrize("end", ["stop", "close"])
def test_nothing_is_sent_to_the_backend_once_the_search_ends(end: str, make: Make) -> None:
    evaluator, backend = make(deep=1, retries=RetryPolicy(crash=1))
    sent: list[str] = []
    backend.watcher.dispatched = lambda task: sent.append(task.id)
    again, _, _ = evaluator.submit([{}, {}, {}])
    backend.send(Failed(start(backend), JobCause.CRASH, ErrorInfo("Crashed", "x"), None, WORKER))
    assert sent == ["0.0", "0.1", "0.2"]
    assert again.state is JobState.QUEUED  # behind the others, which are in the backend
    if end == "close":
        evaluator.close()
    else:
        evaluator.stop("enough")
    assert sent == ["0.0", "0.1", "0.2"]
