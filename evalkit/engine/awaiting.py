"""Awaiter: waits for jobs from within an event loop, without its default threads. To be imported late, with asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from evalkit.job import Job

__all__ = ["Awaiter"]

_log = logging.getLogger("evalkit")

_THREADS = 4  # for calls that may block for a moment, on a storage or on callbacks


class Awaiter:
    """Waits for jobs on behalf of coroutines; a thousand of them cost no thread.

    Args:
        submit: ``submit([parameters])`` returns the jobs.
        take: ``take(job)`` takes a job that has ended; returns whether nobody had before. Does not wait.
        put_back: ``put_back(job)`` undoes that.
        hand_over: ``hand_over([job])`` does what has to be done before a job is returned.
        lend: whether jobs run in the thread that waits for them; one thread, which lives while there are such jobs,
            then does.
    """

    def __init__(
        self,
        submit: Callable[[list[Mapping[str, Any]]], list[Job]],
        take: Callable[[Job], bool],
        put_back: Callable[[Job], None],
        hand_over: Callable[[list[Job]], object],
        lend: bool,
    ) -> None:
        self._submit = submit
        self._take = take
        self._put_back = put_back
        self._hand_over = hand_over
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="evalkit-await")
        self._lend = lend
        self._lock = threading.Lock()
        self._lent: deque[Job] = deque()
        self._lending = False

    async def execute(self, job: Job | Mapping[str, Any]) -> Job:
        """Gather one job, or that of these parameters; see :meth:`evalkit.Evaluator.execute`."""
        if isinstance(job, Job):
            return await self._gather(job)
        submitting = self._start(self._submit, [job])
        try:
            (own,) = await asyncio.wrap_future(submitting)
            return await self._gather(own)
        except BaseException:  # the await was cancelled, and nobody else has the job
            submitting.add_done_callback(_cancel_jobs)
            raise

    async def _gather(self, job: Job) -> Job:
        await self._end_of(job)
        if self._take(job):
            try:
                await asyncio.wrap_future(self._start(self._hand_over, [job]))
            except BaseException:
                # Here and not in the thread, which may take long: who sees that the await was cancelled gathers next.
                self._put_back(job)
                raise
        return job

    def _start(self, function: Callable[[Any], Any], subject: Any) -> Future[Any]:
        """Have a thread call this."""
        try:
            return self._threads.submit(function, subject)
        except RuntimeError:  # closed: nothing blocks any more, and who waited until now gets the job all the same
            called: Future[Any] = Future()
            try:
                called.set_result(function(subject))
            except BaseException as exc:  # noqa: BLE001 - it is for who awaits
                called.set_exception(exc)
            return called

    async def _end_of(self, job: Job) -> None:
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


def _cancel_jobs(submitting: Future[list[Job]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        for job in submitting.result():
            job.cancel()
