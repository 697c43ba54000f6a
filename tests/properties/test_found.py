"""What the property tests found, boiled down: each of these was wrong once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from faketime import FakeTime, fake_time
from scripted import WORKER, ScriptedBackend

from evalkit import Callback, ErrorInfo, Evaluator, JobCause, JobState, RetryPolicy
from evalkit.backends import Done, Failed, Lost
from evalkit.engine.notifier import Notifier
from evalkit.errors import BackendError
from evalkit.storage.memory import MemoryStorage
from evalkit.testing.backend_fixtures import BOUND, in_background

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


class _Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no")


class _Unreadable(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize("metadata", [{_Unspeakable(): 1}, _Unreadable(a=1)], ids=["key", "mapping"])
def test_metadata_that_cannot_be_read_hangs_nobody(metadata: Any, make: Make) -> None:
    evaluator, backend = make()
    (job,) = evaluator.submit([{}])
    backend.send(Done(start(backend), {"objective": 1.0, "metadata": metadata}))
    assert evaluator.gather("ALL") == [job]
    assert (job.state, job.objective) == (JobState.DONE, 1.0)


def test_a_backend_that_takes_no_task_fails_the_job_and_hangs_nobody(make: Make, caplog: Any) -> None:
    evaluator, backend = make()
    backend.dispatch = _refuse  # type: ignore[method-assign]
    (job,) = evaluator.submit([{}])
    assert evaluator.gather("ALL") == [job]
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.LOST)
    assert "the engine is broken" in str(job.error)


def _refuse(tasks: Any) -> None:
    raise BackendError("the engine is broken")


class _Told(Callback):
    def __init__(self) -> None:
        self.told: list[str] = []

    def on_gather(self, jobs: Any) -> None:
        self.told.append("gather")

    def on_close(self) -> None:
        self.told.append("close")


def test_what_is_gathered_after_close_waits_for_no_callback_that_is_gone() -> None:
    told = _Told()
    notifier = Notifier([told])
    notifier.post("on_gather", [[]])
    notifier.close()
    notifier.post("on_gather", [[]])  # a gather in another thread, which close has let go
    in_background(notifier.drain).result(BOUND)
    assert told.told == ["gather", "close"]


class _SlowChanges(MemoryStorage):
    """Answers only when two ask at once, if they may."""

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2)

    def changes(self, *args: Any) -> Any:
        found = super().changes(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            self.both.wait(0.2)
        return found


def test_what_others_did_is_given_to_one_of_two_who_ask_at_once() -> None:
    storage = _SlowChanges()
    with Evaluator.create(lambda job: 1, "serial", {"storage": storage}) as here:
        with Evaluator.create(lambda job: 1, "serial", {"storage": storage, "search_id": here.search_id}) as there:
            there.submit([{}])
            there.gather("ALL")
        answers = [in_background(here.gather_other_jobs_done) for _ in range(2)]
        assert sum(len(answer.result(BOUND)) for answer in answers) == 1
