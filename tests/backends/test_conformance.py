"""Every backend of evalkit, and two small ones of a third party, against the suite that all are held to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

from evalkit import ErrorInfo, Evaluator, JobCause, JobState, RunningJob
from evalkit.backends import RunFailedError, RunLostError, pack_call, read_answer, run_call
from evalkit.backends.asynchronous import AsyncBackend
from evalkit.backends.base import Backend, Capabilities
from evalkit.backends.executor import ExecutorBackend
from evalkit.testing import functions
from evalkit.testing.backend import BackendSuite
from evalkit.testing.backend_failures import BackendExceptions
from evalkit.testing.backend_fixtures import BOUND, eventually
from evalkit.testing.backend_values import BackendValues


class TestSerial(BackendSuite):
    method = "serial"


class TestSerialWithCoroutines(BackendSuite):
    method = "serial"
    coroutines = True


class TestThread(BackendSuite):
    method = "thread"


class TestThreadWithCoroutines(BackendSuite):
    method = "thread"
    coroutines = True


class TestProcess(BackendSuite):
    method = "process"


class _ThirdParty(BackendSuite):
    backend: type[Backend]

    def create(self, run_function: Callable[..., Any], **kwargs: Any) -> Evaluator:
        options = {name: kwargs.pop(name) for name in ("worker_init",) if name in kwargs}
        backend = self.backend(kwargs.pop("num_workers", 1), **options)
        return Evaluator(self.prepare(run_function), backend, **kwargs)


class _OwnAsync(AsyncBackend):
    capabilities = Capabilities(kills_running=True, same_memory=True, by_value=True, streams=True)

    async def execute(self, job: RunningJob) -> Any:
        return await self.run_function(job)


class TestOwnAsyncBackend(_ThirdParty):
    backend = _OwnAsync
    coroutines = True


class _OwnThreads(ExecutorBackend):
    capabilities = Capabilities(same_memory=True, by_value=True, streams=True)

    def make_executor(self) -> Executor:
        return ThreadPoolExecutor(self.num_workers)


class TestOwnThreadExecutor(_ThirdParty):
    backend = _OwnThreads
    exits_at_once = False


class _OwnProcesses(ExecutorBackend):
    capabilities = Capabilities(isolates_crashes=True, by_value=True, streams=True)

    def make_executor(self) -> Executor:
        return ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn"))


class TestOwnProcessExecutor(_ThirdParty):
    backend = _OwnProcesses
    says_how_workers_die = False
    exits_at_once = False


class _Carried(AsyncBackend):
    """A backend that carries runs as bytes to processes that it speaks to with async."""

    capabilities = Capabilities(by_value=True, isolates_crashes=True)

    async def open(self) -> None:
        self._pool = ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn"))

    async def shut(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def execute(self, job: RunningJob) -> Any:
        call = pack_call(self.run_function, job)
        answer = await asyncio.get_running_loop().run_in_executor(self._pool, run_call, call)
        return read_answer(answer, job, self.say_where)


class TestRunsCarriedAsBytes(BackendExceptions, BackendValues):
    """What ``pack_call``, ``run_call`` and ``read_answer`` are for; crashes are those of the pool."""

    def create(self, run_function: Callable[..., Any], **kwargs: Any) -> Evaluator:
        backend = _Carried(kwargs.pop("num_workers", 1))
        return Evaluator(self.prepare(run_function), backend, **kwargs)


class _Telling(AsyncBackend):
    """An engine that knows how runs end, and where they are."""

    def __init__(self) -> None:
        super().__init__(1)
        self.asked: list[str] = []

    async def execute(self, job: RunningJob) -> Any:
        self.say_where(job, "node-7", 4711)
        if job["how"] == "killed":
            raise RunFailedError(JobCause.MEMORY, ErrorInfo("OutOfMemory", "it took 9 GB", "", signal="SIGKILL"))
        if job["how"] == "lost" and not self.asked:
            self.asked.append("lost")
            raise RunLostError("node-7 went away")
        if job["how"] == "asked":
            while not job.stopped() or not self.asked:
                await asyncio.sleep(0.005)
        return job.attempt

    def ask_to_stop(self, job: RunningJob) -> None:
        self.asked.append(job.id)


def test_an_async_backend_says_how_and_where_a_run_ended() -> None:
    with Evaluator(functions.echo, _Telling()) as evaluator:
        killed, lost = evaluator.submit([{"how": "killed"}, {"how": "lost"}])
        evaluator.gather("ALL")
    assert (killed.cause, killed.error and killed.error.signal) == (JobCause.MEMORY, "SIGKILL")
    assert (killed.metadata["host"], killed.metadata["pid"]) == ("node-7", 4711)
    assert lost.state is JobState.DONE, "it ran again, with no retry to use up"


def test_an_async_backend_passes_on_a_request_to_stop() -> None:
    backend = _Telling()
    with Evaluator(functions.echo, backend, grace=BOUND) as evaluator:
        (job,) = evaluator.submit([{"how": "asked"}])
        eventually(lambda: job.is_running, "the start of the job")
        job.cancel()
        evaluator.gather("ALL")
    assert (backend.asked, job.state) == ([job.id], JobState.CANCELLED)


class _SlowToLetGo(AsyncBackend):
    """Needs a moment to let go of what a job uses, as with a process that has to be reaped."""

    capabilities = Capabilities(kills_running=True)

    def __init__(self) -> None:
        super().__init__(1)
        self.let_go = False

    async def execute(self, job: RunningJob) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(20):
                await asyncio.sleep(0.01)
            self.let_go = True


def test_an_async_backend_waits_for_killed_jobs_to_let_go() -> None:
    backend = _SlowToLetGo()
    with Evaluator(functions.echo, backend, job_timeout=0.05, grace=0.0) as evaluator:
        evaluator.submit([{}])
        evaluator.gather("ALL")
    assert backend.let_go
