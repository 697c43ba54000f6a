"""Evaluator: submit, gather, close."""

from __future__ import annotations

import atexit
import inspect
import itertools
import math
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from evalkit.backends.base import Backend
from evalkit.callbacks.base import Callback
from evalkit.engine.clock import Clock
from evalkit.engine.notifier import Notifier
from evalkit.engine.recorder import Recorder
from evalkit.engine.retry import RetryPolicy
from evalkit.engine.scheduler import Scheduler
from evalkit.errors import (
    EvaluatorClosedError,
    GatherInCallbackError,
    MaximumJobsSpawnReached,
    ParametersError,
    SearchStoppedError,
)
from evalkit.job import Job
from evalkit.plugins import close_match, plugins
from evalkit.storage.base import JobRecord, Storage
from evalkit.storage.memory import MemoryStorage

__all__ = ["Evaluator"]

_CHUNK = 1024  # jobs that go through submit at a time
_LAZY_WAIT = 0.02  # seconds that a job may wait for the next ones of a slow iterable
_COMMON = (
    "num_workers",
    "callbacks",
    "run_function_kwargs",
    "storage",
    "search_id",
    "job_timeout",
    "retries",
    "grace",
)

_open: weakref.WeakSet[Evaluator] = weakref.WeakSet()


class Evaluator:
    """Runs a function over parameters, on any backend: submit, gather, close.

    Made by :meth:`create`. Every method may be called from any thread, also from within a running event loop: nothing runs on
    the caller's loop. A failed job is a result, not an exception: ``gather`` never raises because a run function failed.

    Args:
        run_function: called as ``run_function(job)`` with a :class:`evalkit.RunningJob`; ``def`` or ``async def``.
        backend: not started yet.
        callbacks: called in this order.
        run_function_kwargs: further keyword arguments of the run function, sent to each worker once.
        storage: where records live, an instance or a URL; None keeps them in memory.
        search_id: of a search that exists in the storage; None creates one.
        job_timeout: seconds that a job may run, from its start; None for no limit.
        retries: a :class:`evalkit.RetryPolicy`, or an int: so many more attempts after a crash or a loss.
        grace: seconds between asking a job to stop and ending it by force.
    """

    def __init__(
        self,
        run_function: Callable[..., Any],
        backend: Backend,
        *,
        callbacks: Iterable[Callback] | None = None,
        run_function_kwargs: Mapping[str, Any] | None = None,
        storage: Storage | str | None = None,
        search_id: str | None = None,
        job_timeout: float | None = None,
        retries: int | RetryPolicy = 0,
        grace: float = 2.0,
    ) -> None:
        if not callable(run_function):
            raise TypeError(f"the run function must be callable, not {run_function!r}")
        _check_seconds("job_timeout", job_timeout)
        _check_seconds("grace", grace, zero=True)
        policy = RetryPolicy.of(retries)
        observers = _check_callbacks(callbacks)
        self._run_function = run_function
        self._backend = backend
        self._owns_storage = isinstance(storage, str)
        self._storage = _open_storage(storage)
        try:
            if search_id is None:
                self._search_id = self._storage.create_search()
            else:
                self._search_id = self._storage.load_search(str(search_id)).id
            self._owner = os.urandom(6).hex()
            self._cursor = 0
            self._grace = grace
            self._job_timeout = job_timeout
            self._epoch = time.time()
            self._timers = Clock()
            self._notifier = Notifier(observers)
            self._recorder = Recorder(self._storage, self._timers)
            self._scheduler = Scheduler(
                backend,
                self._recorder,
                self._notifier,
                self._timers,
                epoch=self._epoch,
                retries=policy,
                job_timeout=job_timeout,
                grace=grace,
            )
            self._submitting = threading.Lock()
            self._numbers = itertools.count()
            self._submitted = 0
            self._gathered = 0
            self._maximum: int | None = None
            self._stop_reason: str | None = None
            self._timeout: float | None = None
            self._deadline: float | None = None
            self._closing = threading.Lock()
            self._closed = False
            bound = partial(run_function, **run_function_kwargs) if run_function_kwargs else run_function
            backend.start(bound, self._scheduler.emit)
        except BaseException:
            if self._owns_storage:
                self._storage.close()
            raise
        self._notifier.inline = backend.runs_in_caller
        for callback in observers:
            callback.evaluator = self
        _open.add(self)

    @classmethod
    def create(
        cls,
        run_function: Callable[..., Any],
        method: str = "serial",
        method_kwargs: Mapping[str, Any] | None = None,
    ) -> Evaluator:
        """Create an evaluator.

        Args:
            run_function: called as ``run_function(job)``.
            method: the name of the backend: serial, thread, process, or that of a plugin.
            method_kwargs: ``num_workers`` (default 1), the other arguments of :class:`Evaluator`, and the options of the backend.

        Raises:
            ValueError: an unknown method or keyword (names the close match, or the line that installs a known plugin), or a
                value that makes no sense.
            TypeError: the run function is not callable, or a keyword has the wrong type.
            StorageError: the storage cannot be opened, or has no search of that id.
            BackendError: the engine cannot start.
        """
        if not callable(run_function):
            raise TypeError(f"the run function must be callable, not {run_function!r}")
        if not isinstance(method, str):
            raise TypeError(f"method takes the name of a backend, not {method!r}")
        given = dict(method_kwargs or {})
        backend_class = plugins().backend_class(method)
        accepted = _options(backend_class)
        for name in given:
            if name not in accepted and name not in _COMMON:
                candidates = sorted({*accepted, *_COMMON})
                raise ValueError(
                    f"backend {method!r} has no option {name!r}{close_match(str(name), candidates)}; "
                    f"it takes: {', '.join(candidates)}"
                )
        num_workers = given.pop("num_workers", 1)
        if type(num_workers) is not int or num_workers < 1:
            raise ValueError(f"num_workers takes an int of at least 1, not {num_workers!r}")
        options = {name: given.pop(name) for name in accepted if name in given}
        evaluator = cls(run_function, backend_class(num_workers, **options), **given)
        plugins().announce(evaluator)
        return evaluator

    # -- submit and gather ----------------------------------------------------------------------------------------

    def submit(self, args_list: Iterable[Mapping[str, Any]]) -> list[Job]:
        """Submit one job for each mapping of parameters. Returns at once, from any thread.

        A lazy iterable is drawn as it goes, and its first jobs run while it still produces. A list is all or nothing: one entry
        that is not a mapping, or a maximum that it would pass, and nothing of it is submitted. Parameters are copied.

        Args:
            args_list: any iterable of mappings, with strings as keys.

        Returns:
            the jobs, in order: the same objects that ``gather`` will return.

        Raises:
            ParametersError: an entry is not a mapping with strings as keys; says which.
            MaximumJobsSpawnReached: it would pass the maximum; nothing was submitted.
            SearchStoppedError: the search was stopped or its time is up.
            EvaluatorClosedError: after ``close``.
            StorageUnavailableError: the storage does not take them; nothing (more) was submitted.
        """
        self._check_open()
        if isinstance(args_list, Mapping | str | bytes):
            raise ParametersError(f"submit takes an iterable of mappings, not {args_list!r}; write submit([{{...}}])")
        with self._submitting:
            self._check_going()
            left = None if self._maximum is None else self._maximum - self._submitted
            if not isinstance(args_list, Sequence) and left is not None:
                args_list = list(itertools.islice(args_list, left + 1))
            if isinstance(args_list, Sequence):
                copies = [_parameters(args, index) for index, args in enumerate(args_list)]
                if left is not None and len(copies) > left:
                    raise MaximumJobsSpawnReached(self._maximum or 0, self._submitted)
                jobs = []
                for start in range(0, len(copies), _CHUNK):
                    jobs += self._admit(copies[start : start + _CHUNK])
                return jobs
            return self._submit_lazily(args_list)

    def _submit_lazily(self, args_list: Iterable[Mapping[str, Any]]) -> list[Job]:
        jobs: list[Job] = []
        chunk: list[dict[str, Any]] = []
        due = time.monotonic() + _LAZY_WAIT
        try:
            for index, args in enumerate(args_list):
                chunk.append(_parameters(args, index))
                if len(chunk) >= _CHUNK or time.monotonic() >= due:
                    ready, chunk = chunk, []
                    jobs += self._admit(ready)
                    due = time.monotonic() + _LAZY_WAIT
        finally:
            # What the iterable gave before it failed is submitted.
            if chunk:
                jobs += self._admit(chunk)
        return jobs

    def _admit(self, copies: list[dict[str, Any]]) -> list[Job]:
        self._check_open()
        ids = self._storage.create_jobs(self._search_id, copies, owner=self._owner)
        now, numbers, scheduler = self._scheduler.clock(), self._numbers, self._scheduler
        jobs = [
            Job(job_id, args, number=next(numbers), created=now, owner=scheduler)
            for job_id, args in zip(ids, copies, strict=True)
        ]
        if jobs:
            self._submitted += len(jobs)
            scheduler.admit(jobs)
        return jobs

    def gather(self, type: Literal["ALL", "BATCH"], size: int = 1) -> list[Job]:
        """Wait for jobs and return them: each job exactly once, whoever gathers.

        Args:
            type: ``"ALL"``: every job that is out at the time of the call, in the order of submission. ``"BATCH"``: at least
                ``size`` jobs, and whatever else has finished, in the order in which they ended.
            size: clamped to what is out, with a warning; at least 1.

        Returns:
            jobs that have ended, well or not, and are in the storage; ``[]`` if nothing is out.

        Raises:
            ValueError: another type or size.
            StorageUnavailableError: the results cannot be stored now; they are kept, and a later gather returns them.
            EvaluatorClosedError: after ``close``.
        """
        if type not in ("ALL", "BATCH"):
            raise ValueError(f"gather takes 'ALL' or 'BATCH', not {type!r}")
        if not _is_int(size) or size < 1:
            raise ValueError(f"gather takes a size of at least 1, not {size!r}")
        self._check_open()
        if self._notifier.in_callback:
            raise GatherInCallbackError("a callback cannot gather: it would wait for itself; gather in the loop")
        if type == "ALL":
            jobs = self._scheduler.wait_all()
        else:
            jobs, out = self._scheduler.wait_batch(size)
            if 0 < out < size:
                warnings.warn(f"gather('BATCH', {size}) with {out} jobs out: waited for {out}", stacklevel=2)
        return self._hand_over(jobs)

    def _hand_over(self, jobs: list[Job]) -> list[Job]:
        """What has to be true before jobs are returned: they are durable, and the callbacks have seen them."""
        if not jobs:
            return jobs
        try:
            self._recorder.flush()
        except BaseException:
            self._scheduler.put_back(jobs)
            raise
        self._gathered += len(jobs)
        if self._notifier.active:
            self._notifier.post("on_gather", [jobs])
            self._notifier.drain()
        return jobs

    def gather_other_jobs_done(self) -> list[Job]:
        """The jobs of this search that others ended since the last call, each once; costs what has changed.

        Raises:
            StorageUnavailableError: the storage is away.
            EvaluatorClosedError: after ``close``.
        """
        self._check_open()
        records, self._cursor = self._storage.changes(self._search_id, self._cursor)
        jobs = [_job_of(record) for record in records if record.owner != self._owner and record.is_complete]
        if jobs and self._notifier.active:
            self._notifier.post("on_done_other", jobs)
            if not self._notifier.in_callback:
                self._notifier.drain()
        return jobs

    async def execute(self, job: Job | Mapping[str, Any]) -> Job:
        """Wait for one job without blocking the running loop; this gathers it.

        Args:
            job: a job that ``submit`` returned, or parameters, which are then submitted.

        Returns:
            the job, ended and in the storage; no later ``gather`` returns it.
        """
        import asyncio  # here, since it takes a third of the time that evalkit takes to import

        if not isinstance(job, Job):
            (job,) = await asyncio.to_thread(self.submit, [job])
        await asyncio.to_thread(job.wait)
        if self._scheduler.take(job):
            await asyncio.to_thread(self._hand_over, [job])
        return job

    # -- budget ---------------------------------------------------------------------------------------------------

    @property
    def timeout(self) -> float | None:
        """The budget of the search, in seconds from when it was set; None for no limit.

        When it is over, nothing more can be submitted, what waits is cancelled, and what runs is asked to stop, then ended.
        """
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        _check_seconds("timeout", seconds)
        self._check_open()
        self._timeout = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        if self._deadline is not None and seconds is not None:
            self._timers.call_later(seconds, self._run_out, self._deadline)

    def _run_out(self, deadline: float) -> None:
        if deadline == self._deadline and not self._closed:
            self._scheduler.close_intake(f"the timeout of {self._timeout:g} s has passed")

    @property
    def time_left(self) -> float:
        """Seconds until the timeout, at least 0.0; ``math.inf`` without one."""
        return math.inf if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def set_maximum_num_jobs_submitted(self, n: int | None) -> None:
        """Let no more than ``n`` jobs be submitted in all; the submit that would pass it raises. None takes the limit away."""
        if n is not None and (not _is_int(n) or n < 0):
            raise ValueError(f"the maximum number of jobs is an int of at least 0, or None, not {n!r}")
        with self._submitting:
            self._maximum = n

    def stop(self, reason: str) -> None:
        """Take nothing more in, cancel what waits, ask what runs to stop, then end it. ``gather`` returns all of them."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._scheduler.close_intake(reason)

    @property
    def stop_reason(self) -> str | None:
        """Why nothing more can be submitted; None as long as it can."""
        if self._stop_reason is None and self.time_left <= 0.0:
            return f"the timeout of {self._timeout:g} s has passed"
        return self._stop_reason

    # -- what there is to read ------------------------------------------------------------------------------------

    @property
    def num_workers(self) -> int:
        """How many jobs run at once."""
        return self._backend.num_workers

    @property
    def num_jobs_submitted(self) -> int:
        return self._submitted

    @property
    def num_jobs_gathered(self) -> int:
        return self._gathered

    @property
    def is_master(self) -> bool:
        """Whether this process drives; False on the ranks of an MPI program that only serve."""
        return self._backend.is_master

    @property
    def search_id(self) -> str:
        return self._search_id

    @property
    def storage(self) -> Storage:
        return self._storage

    @property
    def backend(self) -> Backend:
        return self._backend

    def add_callback(self, callback: Callback) -> None:
        """Have a callback called from now on."""
        _check_callbacks([callback])
        callback.evaluator = self
        self._notifier.add(callback)

    def to_json(self) -> dict[str, Any]:
        """What it is and how far it is, as JSON can hold it."""
        function = self._run_function
        name = getattr(function, "__qualname__", None)
        return {
            "type": type(self).__name__,
            "backend": type(self._backend).__name__,
            "run_function": f"{function.__module__}.{name}" if name else repr(function),
            "num_workers": self.num_workers,
            "search_id": self._search_id,
            "storage": self._storage.url,
            "timeout": self._timeout,
            "job_timeout": self._job_timeout,
            "num_jobs_submitted": self._submitted,
            "num_jobs_gathered": self._gathered,
            "is_master": self.is_master,
            "closed": self._closed,
        }

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._submitted} submitted, {self._gathered} gathered"
        return f"<Evaluator on {type(self._backend).__name__}, search {self._search_id!r}, {state}>"

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> list[Job]:
        """Cancel what is out, give what runs its grace, write what is not written, release everything.

        Returns within the grace and a few seconds, whatever the jobs do. Calling it again does nothing.

        Returns:
            the jobs that it cancelled.

        Raises:
            StorageUnavailableError: the last results cannot be stored; all else is released.
        """
        if self._notifier.in_callback:
            raise GatherInCallbackError("a callback cannot close the evaluator: it would wait for itself; call stop()")
        with self._closing:
            if self._closed:
                return []
            self._closed = True
            _open.discard(self)
            reason = "the evaluator was closed"
            try:
                cancelled = self._scheduler.close_intake(reason)
                self._backend.stop(self._grace)
            finally:
                self._scheduler.give_up(reason)
                self._timers.close()
                try:
                    self._recorder.flush()
                finally:
                    if self._notifier.active:
                        self._notifier.post("on_close", [None])
                    self._notifier.close()
                    if self._owns_storage:
                        self._storage.close()
            return cancelled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EvaluatorClosedError("this evaluator is closed; create another one")

    def _check_going(self) -> None:
        reason = self.stop_reason
        if reason is not None:
            raise SearchStoppedError(f"nothing more can be submitted: {reason}")


@atexit.register
def _close_what_is_open() -> None:
    """Whoever forgets to close leaves no process behind."""
    for evaluator in list(_open):
        evaluator.close()


def _options(backend_class: type[Backend]) -> list[str]:
    """The options of a backend: the keyword-only parameters of its ``__init__``."""
    parameters = inspect.signature(backend_class.__init__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _open_storage(storage: Storage | str | None) -> Storage:
    if storage is None:
        return MemoryStorage()
    if isinstance(storage, str):
        return plugins().open_storage(storage)
    if isinstance(storage, Storage):
        return storage
    raise TypeError(f"storage takes a Storage or a URL such as sqlite:///study.db, not {storage!r}")


def _parameters(args: Any, index: int) -> dict[str, Any]:
    """A copy of the parameters of one job."""
    if not isinstance(args, Mapping):
        raise ParametersError(f"parameters are mappings; entry {index} is {type(args).__name__}: {args!r:.200}")
    copy = dict(args)
    for key in copy:
        if type(key) is not str and not isinstance(key, str):
            raise ParametersError(f"the names of parameters are strings; entry {index} has {key!r}")
    return copy


def _job_of(record: JobRecord) -> Job:
    """A job that ended elsewhere, as a handle."""
    job = Job(record.id, record.args, number=record.number)
    job.restore(record.state, record.output, record.error, record.cause, record.attempt, record.records, record.metadata)
    return job


def _check_callbacks(callbacks: Iterable[Callback] | None) -> list[Callback]:
    checked = list(callbacks or ())
    for callback in checked:
        if not isinstance(callback, Callback):
            raise TypeError(f"a callback is an instance of evalkit.Callback, not {callback!r}")
    return checked


def _check_seconds(name: str, value: Any, zero: bool = False) -> None:
    if value is None and not zero:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name} takes a positive number of seconds{'' if zero else ', or None'}, not {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
