"""LokyWorkers: an executor of loky's worker processes, in which each worker can be ended by itself."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, wait
from typing import Any

import psutil
from loky.process_executor import ProcessPoolExecutor, ShutdownExecutorError

from evalkit.backends import Program, Receive, unpack_exception
from evalkit_loky.connection import Connection, Kind
from evalkit_loky.deaths import death_of, exit_of
from evalkit_loky.serving import descendants, get_ready, serve

__all__ = ["LokyWorkers"]

_START = 2.0  # seconds that workers may take to come up and end, where others cannot start
_LAST_WORDS = 10.0  # seconds in which loky notices that a worker has gone


class LokyWorkers(Executor):
    """As many of loky's pools as there are workers, with one worker each.

    loky ends all workers of a pool when one dies, and cannot end a single one. So each has a pool of its own: a death,
    and a kill, costs the call that was in it and no other. A pool that has lost its worker is replaced at the next
    call.

    loky starts the processes, and tells how they end. Calls and the side channel go through a connection of our own to
    each: through a pool, calls would pass three threads of this process, which takes twice as long.

    Args:
        num_workers: how many; more calls than that wait behind others.
        program: what all calls are of; it goes to each worker once.
        receive: called with each message of the side channel, in a thread of the worker that sent it.
    """

    def __init__(self, num_workers: int, program: Program, receive: Receive) -> None:
        self._program = program
        self._receive = receive
        self._lock = threading.Lock()
        self._shut = False
        self._workers: list[_Worker | None] = [None] * num_workers
        try:
            for index in range(num_workers):
                self._workers[index] = _Worker(program, receive)
        except BaseException:  # no more descriptors, say
            self.end(_START, kill=True)
            raise

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if fn is not self._program or kwargs:
            raise TypeError("these workers run one program, which takes a chunk")
        (chunk,) = args
        with self._lock:
            if self._shut:
                raise RuntimeError("cannot submit after shutdown")
            index = min(range(len(self._workers)), key=self._calls_of)
            worker = self._workers[index]
            if worker is None or not worker.usable():
                if worker is not None:
                    worker.close()
                worker = self._workers[index] = _Worker(self._program, self._receive)
            return worker.submit(chunk)

    def _calls_of(self, index: int) -> int:
        worker = self._workers[index]
        return 0 if worker is None else len(worker.calls)

    def request_stop(self, run: int) -> None:
        """Tell the workers that a run is to stop. One of them has it, in its call, or it has ended."""
        for worker in tuple(self._workers):
            if worker is not None and worker.calls:
                worker.request_stop(run)

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
        started = [child for process in processes for child in descendants(process)] if kill else []
        for worker in workers:
            if kill and worker.calls:
                worker.kill()
            else:
                worker.close()
        deadline = time.monotonic() + patience
        _, alive = psutil.wait_procs(processes, max(0.0, patience))
        # One that is about to start ends when it has, unless that takes long: loky complains where it is killed.
        for worker in workers if kill else ():
            if not worker.has_ended(deadline - time.monotonic()):
                worker.kill()
        for process in [*alive, *started] if kill else ():
            with contextlib.suppress(psutil.Error):
                process.kill()


class _Worker:
    """A pool of one, and the connection to its process."""

    def __init__(self, program: Program, receive: Receive) -> None:
        #: The calls that are in it, in order.
        self.calls: deque[Future[Any]] = deque()
        self._pid: int | None = None  # until it says
        self._broken = False
        self._end: BaseException | None = None  # why there are no more answers
        self._lock = threading.Lock()
        self._receive = receive
        self._connection = Connection()
        initargs = (program, os.getpid(), self._connection.theirs)
        self._pool = ProcessPoolExecutor(1, initializer=get_ready, initargs=initargs)
        try:
            self._serving = self._pool.submit(serve, program.resident)  # and so it starts
            self._serving.add_done_callback(lambda _: self._connection.hang_up())
            threading.Thread(target=self._read, name="evalkit-loky", daemon=True).start()
        except BaseException:
            self._pool.shutdown(wait=False, kill_workers=True)
            self._connection.close()
            raise
        finally:
            self._connection.theirs.close()

    def submit(self, chunk: bytes) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            end = self._end
            if end is None:
                self.calls.append(future)
                self._connection.send(Kind.CHUNK, chunk)
        if end is not None:
            future.set_exception(end)
        return future

    def request_stop(self, run: int) -> None:
        self._connection.send(Kind.STOP, run.to_bytes(8, "little"))

    def _read(self) -> None:
        """Take what the worker says; at its end, end the calls that it has not answered."""
        end: BaseException | None = None
        try:
            while True:
                self._take(*self._connection.receive())
        except EOFError:
            pass
        except BaseException as exc:  # noqa: BLE001 - no room for an answer, say; nobody else ends the calls
            end = exc
        self._broken = True
        self._connection.hang_up()
        end = end or (None if self._pid is None else death_of(self._pid)) or self._reason()
        self._pool.shutdown(wait=False, kill_workers=True)
        with self._lock:
            self._end = end
        # By the time at which anybody hears of it, this worker has no calls: what is sent then goes to the idlest.
        calls = list(self.calls)
        self.calls.clear()
        for future in calls:
            future.set_exception(end)
        self._connection.close()

    def _take(self, kind: int, message: bytes) -> None:
        if kind == Kind.MESSAGE:
            self._receive(message)
        elif kind == Kind.READY:
            self._pid = int(message)
            self._connection.watch(self._pid)
        else:
            future = self.calls.popleft()  # it has room for another by the time at which anybody hears of this one
            if kind == Kind.ANSWER:
                future.set_result(message)
            else:
                future.set_exception(unpack_exception(message))

    def _reason(self) -> BaseException:
        """Why the worker does not answer any more, as loky says it."""
        exc: BaseException | None = None
        with contextlib.suppress(CancelledError, TimeoutError):
            exc = self._serving.exception(_LAST_WORDS)
        return exc or ShutdownExecutorError("the worker was ended")

    def usable(self) -> bool:
        """Whether its process lives: one that has died is noticed here before loky does, and costs no call."""
        if self._broken or self._serving.done():
            return False
        if self._pid is None:
            return True
        try:
            return exit_of(self._pid) is None
        except ChildProcessError:  # loky has noticed
            return False

    def close(self) -> None:
        """Let it end by itself, when it has nothing more to do."""
        self._broken = True
        self._connection.hang_up()
        self._pool.shutdown(wait=False)

    def has_ended(self, timeout: float) -> bool:
        """Wait for the end of its one call, at most ``timeout`` seconds; say whether that came."""
        return bool(wait([self._serving], max(0.0, timeout)).done)

    def kill(self) -> None:
        self._broken = True
        self._pool.shutdown(wait=False, kill_workers=True)

    def process(self) -> psutil.Process | None:
        """Its process; None if it has ended, or is only about to start."""
        try:
            return None if self._pid is None or self._serving.done() else psutil.Process(self._pid)
        except psutil.Error:
            return None
