"""Awaiter: waits for jobs from within an event loop, without its default threads. To be imported late, with asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from evalkit.job import Job

__all__ = ["Awaiter"]

_log = logging.getLogger("evalkit")
_T = TypeVar("_T")

_THREADS = 4  # for calls that may block for a moment, on a storage or on callbacks


class Awaiter:
    """Waits for the ends of jobs on behalf of coroutines; a thousand of them cost no thread.

    Args:
        lend: whether jobs run in the thread that waits for them; one thread, which lives while there are such jobs,
            then does.
    """

    def __init__(self, lend: bool) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="evalkit-await")
        self._lend = lend
        self._lock = threading.Lock()
        self._lent: deque[Job] = deque()
        self._lending = False

    async def call(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call something that may block, in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def end_of(self, job: Job) -> None:
        """Return when the job has ended."""
        if job.wait(0):
            return
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def settle() -> None:
            if not ended.done():  # who waited may have been cancelled
                ended.set_result(None)

        def tell(_: Job) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(settle)

        job.when_complete(tell)
        if self._lend:
            self._wait_for(job)
        await ended

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False)

    def _wait_for(self, job: Job) -> None:
        with self._lock:
            self._lent.append(job)
            if not self._lending:
                self._lending = True
                threading.Thread(target=self._serve, name="evalkit-lent", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self._lent:
                    self._lending = False
                    return
                job = self._lent.popleft()
            try:
                job.wait()
            except BaseException:  # noqa: BLE001 - a run function may do anything; the next one waits
                _log.exception("the thread that runs awaited jobs met an error")
