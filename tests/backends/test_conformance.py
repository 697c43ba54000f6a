"""Every backend of evalkit, and two small ones of a third party, against the suite that all are held to."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

from evalkit import Evaluator, RunningJob
from evalkit.backends.asynchronous import AsyncBackend
from evalkit.backends.base import Backend, Capabilities
from evalkit.backends.executor import ExecutorBackend
from evalkit.testing.backend import BackendSuite


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
