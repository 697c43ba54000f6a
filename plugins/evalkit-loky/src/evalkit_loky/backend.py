"""The loky backend."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from loky.process_executor import BrokenProcessPool, ShutdownExecutorError

from evalkit import ErrorInfo, JobCause
from evalkit.backends import Capabilities, ExecutorBackend, Fault, Reach, Receive, SideChannel
from evalkit_loky.worker_end import WORKER_END
from evalkit_loky.workers import LokyWorkers

__all__ = ["LokyBackend"]

_EXIT = re.compile(r"\{(\w+)\((-?\d+)\)\}")  # what loky says of a worker that died: {SIGKILL(-9)}, {EXIT(3)}


class LokyBackend(ExecutorBackend):
    """Jobs in loky's worker processes, on this machine.

    The workers are this evaluator's own: neither joblib nor another evaluator runs anything in them.

    Args:
        num_workers: how many processes.
        worker_init: called once in each worker before its first job; what it returns is ``job.worker_state``.
        batching: whether cheap jobs may travel together in a call.
        hold: seconds that a result may be held back by others of its call.

    Raises:
        ValueError, TypeError: an option makes no sense.
    """

    capabilities = Capabilities(kills_running=True, isolates_crashes=True, by_value=True, streams=True)

    def __init__(
        self,
        num_workers: int,
        *,
        worker_init: Callable[[], Any] | None = None,
        batching: bool = True,
        hold: float = 0.010,
    ) -> None:
        super().__init__(num_workers, worker_init=worker_init, batching=batching, hold=hold)

    def make_channel(self) -> SideChannel:
        self._side_channel = _Channel(self)
        return self._side_channel

    def make_executor(self) -> Executor:
        return LokyWorkers(self.num_workers, self.program, self._side_channel.receive)

    @staticmethod
    def worker_name() -> str:
        return f"loky-{os.getpid()}"

    def blame(self, exc: BaseException) -> Fault:
        if isinstance(exc, BrokenProcessPool):
            said = _EXIT.search(str(exc))
            name, code = (said[1], int(said[2])) if said else ("", 0)
            how = f": {name}" if code < 0 else f" with exit code {code}" if said else ""
            error = ErrorInfo(
                "WorkerDied",
                f"the worker process it ran in died{how}",
                exit_code=code if said and code >= 0 else None,
                signal=name if code < 0 else None,
            )
            return Fault(Reach.CALL, JobCause.CRASH, error)
        if isinstance(exc, ShutdownExecutorError):
            return Fault(Reach.CALL, JobCause.LOST, ErrorInfo("WorkerEnded", "the worker it ran in was ended"))
        return super().blame(exc)

    def kill(self, future: Future[Any]) -> bool:
        executor = self.executor
        return isinstance(executor, LokyWorkers) and executor.kill(future)

    def shut_executor(self, executor: Executor, grace: float) -> None:
        if isinstance(executor, LokyWorkers):
            executor.end(grace, kill=True)


class _Channel(SideChannel):
    """The side channel, over the connection that each worker has."""

    client = WORKER_END

    def __init__(self, backend: LokyBackend) -> None:
        self._backend = backend
        self._to: Receive | None = None

    def start(self, receive: Receive) -> None:
        self._to = receive

    def receive(self, message: bytes) -> None:
        to = self._to
        if to is not None:
            to(message)

    def request_stop(self, run: int) -> None:
        executor = self._backend.executor
        if isinstance(executor, LokyWorkers):
            executor.request_stop(run)

    def close(self) -> None:
        self._to = None
