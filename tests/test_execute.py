"""``await evaluator.execute(...)`` that is cancelled, or whose evaluator is closed: no job is lost."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import pytest

from evalkit import Callback, Evaluator, Job, JobState
from evalkit.errors import EvaluatorClosedError
from evalkit.storage import MemoryStorage
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, in_background
from evalkit.testing.functions import Plain, echo, hold


@pytest.fixture
def files(tmp_path) -> Any:
    files = Files(tmp_path)
    yield files
    files.release_all()


class Gate:
    """A place where a thread waits until it is let through."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.open.wait(BOUND)


class WaitsInGather(Callback):
    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_gather(self, jobs: list[Job]) -> None:
        self.gate.pass_through()


class WaitsInCreate(MemoryStorage):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def create_jobs(self, *args: Any, **kwargs: Any) -> list[str]:
        self.gate.pass_through()
        return super().create_jobs(*args, **kwargs)


async def cancel_at(gate: Gate, waiting: asyncio.Task[Job]) -> None:
    """Cancel an await when a thread of it has come to the gate, then let the thread through."""
    while not gate.reached.is_set():
        await asyncio.sleep(0.001)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open.set()


def test_a_job_that_was_being_gathered_is_returned_by_the_next_gather() -> None:
    gate = Gate()

    async def main(evaluator: Evaluator, job: Job) -> None:
        await cancel_at(gate, asyncio.create_task(evaluator.execute(job)))

    with Evaluator.create(echo, "thread", {"callbacks": [WaitsInGather(gate)]}) as evaluator:
        (job,) = evaluator.submit([{"x": 1}])
        in_background(asyncio.run, main(evaluator, job)).result(BOUND)
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [job]
        assert (job.state, evaluator.num_jobs_gathered) == (JobState.DONE, 1)


def test_a_job_that_was_being_gathered_is_returned_by_the_next_execute() -> None:
    gate = Gate()

    async def main(evaluator: Evaluator, job: Job) -> Job:
        await cancel_at(gate, asyncio.create_task(evaluator.execute(job)))
        return await evaluator.execute(job)

    with Evaluator.create(echo, "thread", {"callbacks": [WaitsInGather(gate)]}) as evaluator:
        (job,) = evaluator.submit([{"x": 1}])
        assert in_background(asyncio.run, main(evaluator, job)).result(BOUND) is job
        assert evaluator.gather("ALL") == []


def test_a_job_of_parameters_is_cancelled_with_its_await(files: Files) -> None:
    async def main(evaluator: Evaluator) -> None:
        waiting = asyncio.create_task(evaluator.execute(files.holder("a")))
        while not files.exists("a.started"):
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with Evaluator.create(Plain(hold), "process") as evaluator:
        in_background(asyncio.run, main(evaluator)).result(BOUND)
        (job,) = in_background(evaluator.gather, "ALL").result(BOUND)
        assert job.state is JobState.CANCELLED


def test_a_job_of_parameters_that_was_being_submitted_is_cancelled() -> None:
    gate = Gate()

    async def main(evaluator: Evaluator) -> None:
        await cancel_at(gate, asyncio.create_task(evaluator.execute({"x": 1})))

    with Evaluator.create(Plain(hold), "process", {"storage": WaitsInCreate(gate)}) as evaluator:
        in_background(asyncio.run, main(evaluator)).result(BOUND)
        while not (jobs := in_background(evaluator.gather, "ALL").result(BOUND)):
            pass  # it was still being submitted
        assert [job.is_complete for job in jobs] == [True]


def test_a_job_is_not_gathered_from_the_moment_at_which_its_await_was_cancelled() -> None:
    """A thread of the await may still be in a callback."""
    gate = Gate()

    async def main(evaluator: Evaluator, job: Job) -> None:
        waiting = asyncio.create_task(evaluator.execute(job))
        while not gate.reached.is_set():
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert evaluator.num_jobs_gathered == 0
        gate.open.set()
        assert await evaluator.execute(job) is job

    with Evaluator.create(echo, "thread", {"callbacks": [WaitsInGather(gate)]}) as evaluator:
        (job,) = evaluator.submit([{"x": 1}])
        in_background(asyncio.run, main(evaluator, job)).result(BOUND)
        assert evaluator.gather("ALL") == []
        assert evaluator.num_jobs_gathered == 1


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_awaits_that_are_cancelled_at_any_moment_lose_nothing(method: str) -> None:
    rng = random.Random(3)

    async def wait(evaluator: Evaluator, job: Job) -> Job | None:
        try:
            async with asyncio.timeout(rng.random() * 0.004):
                return await evaluator.execute(job)
        except TimeoutError:
            return None

    async def main(evaluator: Evaluator) -> None:
        for _ in range(20):
            jobs = evaluator.submit([{"x": x} for x in range(10)])
            got = [job for job in await asyncio.gather(*(wait(evaluator, job) for job in jobs)) if job is not None]
            got += await asyncio.to_thread(evaluator.gather, "ALL")
            assert sorted(job.id for job in got) == sorted(job.id for job in jobs)

    with Evaluator.create(echo, method, {"num_workers": 2}) as evaluator:
        in_background(asyncio.run, main(evaluator)).result(BOUND)
        assert evaluator.num_jobs_gathered == 200


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_an_await_that_is_under_way_at_the_close_returns_its_job(method: str, files: Files) -> None:
    evaluator = Evaluator.create(Plain(hold), method, {"grace": 0.1})

    async def main() -> Job:
        waiting = asyncio.create_task(evaluator.execute(job))
        await asyncio.to_thread(files.wait_started, "held")
        closing = asyncio.create_task(asyncio.to_thread(evaluator.close))
        await asyncio.sleep(0)
        files.release("held")
        await closing
        return await waiting

    (job,) = evaluator.submit([files.holder("held")])
    assert in_background(asyncio.run, main()).result(BOUND) is job
    assert job.is_complete


@pytest.mark.parametrize("method", ["serial", "thread"])
@pytest.mark.parametrize("before", [True, False])
def test_execute_after_the_close_refuses_parameters_and_leaves_no_thread(method: str, before: bool) -> None:
    threads = set(threading.enumerate())
    with Evaluator.create(Plain(echo), method) as evaluator:
        jobs = evaluator.submit([{"x": 1}, {"x": 2}])
        evaluator.gather("ALL")
        if before:
            asyncio.run(evaluator.execute({"x": 3}))
    assert asyncio.run(evaluator.execute(jobs[0])) is jobs[0]
    with pytest.raises(EvaluatorClosedError):
        asyncio.run(evaluator.execute({"x": 4}))
    eventually(lambda: set(threading.enumerate()) <= threads, "the end of the threads")
