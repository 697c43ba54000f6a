"""LokyWorkers: an executor of loky's worker processes, in which each worker can be ended by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import psutil
from loky.process_executor import ProcessPoolExecutor

from evalkit.backends import Program

__all__ = ["LokyWorkers"]

_PARENT_INTERVAL = 0.5  # seconds between looks at whether the main process is there


class LokyWorkers(Executor):
    """As many of loky's pools as there are workers, with one worker each.

    loky ends all workers of a pool when one dies, and cannot end a single one. So each has a pool of its own: a death,
    and a kill, costs the call that was in it and no other. A pool that has lost its worker is replaced at the next
    call.

    Args:
        num_workers: how many; more calls than that wait behind others.
        program: what all calls are of; it goes to each worker once.
    """

    def __init__(self, num_workers: int, program: Program) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._shut = False
        self._workers: list[_Worker | None] = [None] * num_workers
        for index in range(num_workers):
            self._workers[index] = _Worker(program)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._lock:
            if self._shut:
                raise RuntimeError("cannot submit after shutdown")
            index = min(range(len(self._workers)), key=self._calls_of)
            worker = self._workers[index]
            if worker is None or not worker.usable():
                if worker is not None:
                    worker.pool.shutdown(wait=False)
                worker = self._workers[index] = _Worker(self._program)
            return worker.submit(self._program.resident if fn is self._program else fn, *args, **kwargs)

    def _calls_of(self, index: int) -> int:
        worker = self._workers[index]
        return 0 if worker is None else len(worker.calls)

    def kill(self, future: Future[Any]) -> bool:
        """End the worker that a call is in, and what it has started; say whether there was one."""
        with self._lock:
            for index, worker in enumerate(self._workers):
                if worker is not None and future in worker.calls:
                    self._workers[index] = None
                    worker.kill()
                    return True
        return False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers: those with nothing to do by themselves, the others by force if ``cancel_futures``."""
        self.end(5.0 if wait else 0.0, kill=cancel_futures)

    def end(self, patience: float, *, kill: bool) -> None:
        """As :meth:`shutdown`.

        Args:
            patience: seconds to wait for workers to end.
            kill: whether those that have a call are ended now, and the others when the time is up.
        """
        with self._lock:
            self._shut = True
            workers = [worker for worker in self._workers if worker is not None]
            self._workers = [None] * len(self._workers)
        processes = [process for worker in workers if (process := worker.process()) is not None]
        # What their jobs have left running, which nobody will find any more once the workers are gone.
        started = [child for process in processes for child in _descendants(process)] if kill else []
        for worker in workers:
            if kill and worker.calls:
                worker.kill()
            else:
                worker.pool.shutdown(wait=False)
        _, alive = psutil.wait_procs(processes, max(0.0, patience))
        for process in [*alive, *started] if kill else ():
            with contextlib.suppress(psutil.Error):
                process.kill()


def _get_ready(program: Program, parent: int) -> None:
    """In a worker, before its first call."""
    threading.Thread(target=_end_with, args=(parent,), name="evalkit-parent", daemon=True).start()
    # Ctrl-C in a terminal goes to all; what it means for the jobs is for the main process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program.install()


def _end_with(parent: int) -> None:
    """End this worker, and what its job has started, once the main process has gone; loky would wait for ever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_INTERVAL)
    for child in _descendants(psutil.Process()):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


class _Worker:
    """A pool of one."""

    def __init__(self, program: Program) -> None:
        self.pool = ProcessPoolExecutor(1, initializer=_get_ready, initargs=(program, os.getpid()))
        #: The calls that are in it.
        self.calls: set[Future[Any]] = set()
        self._broken = False
        # It starts now, and says which process it is.
        self._hello = self.pool.submit(os.getpid)

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = self.pool.submit(fn, *args, **kwargs)
        self.calls.add(future)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: Future[Any]) -> None:
        self.calls.discard(future)
        if not future.cancelled() and future.exception() is not None:
            self._broken = True

    def usable(self) -> bool:
        """Whether its process lives: one that has died is noticed here before loky does, and costs no call."""
        if self._broken or (self._hello.done() and self._hello.exception() is not None):
            return False
        if not self._hello.done():
            return True
        try:
            exited = os.waitid(os.P_PID, self._hello.result(), os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # loky has noticed
            return False
        return exited is None

    def kill(self) -> None:
        self._broken = True
        self.pool.shutdown(wait=False, kill_workers=True)

    def process(self) -> psutil.Process | None:
        """Its process; None if it has ended, or is only about to start."""
        if not self._hello.done() or self._hello.cancelled() or self._hello.exception() is not None:
            return None
        try:
            return psutil.Process(self._hello.result())
        except psutil.Error:
            return None
