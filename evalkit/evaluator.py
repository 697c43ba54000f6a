"""Evaluator: submit, gather, close."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from evalkit.backends.base import Backend
from evalkit.backends.importing import check_not_importing
from evalkit.callbacks.base import Callback
from evalkit.engine.arguments import (
    check_callbacks,
    check_run_function,
    check_seconds,
    entries_of,
    is_int,
    make_backend,
    open_storage,
    parameters_of_all,
)
from evalkit.engine.budget import Budget
from evalkit.engine.clock import Clock
from evalkit.engine.drawing import Drawer, chunks_of
from evalkit.engine.notifier import Notifier
from evalkit.engine.recorder import Recorder
from evalkit.engine.resources import Resources, check_resources
from evalkit.engine.retry import RetryPolicy
from evalkit.engine.scheduler import Scheduler
from evalkit.engine.waiting import AllWaiter, BatchWaiter
from evalkit.errors import (
    GatherInCallbackError,
    SearchStoppedError,
)
from evalkit.interrupts import InterruptHeld
from evalkit.job import Job, JobState
from evalkit.plugins import plugins
from evalkit.storage.base import JobRecord, Storage

if TYPE_CHECKING:
    from evalkit.engine.awaiting import Awaiter

__all__ = ["Evaluator"]

_LONGEST_GRACE = 1e6  # seconds; engines count in smaller units, and what is longer is never waited for
_LAST_SUBMIT = 5.0  # seconds that close waits for a submit that is under way
_SERVED = (
    "this process only served the one that drives, which has closed the evaluator: put what submits and gathers under "
    "'if evaluator.is_master:'"
)
_CLOSED = "the evaluator was closed"
_open: set[Evaluator] = set()  # held until they are closed: a job may run on though nobody holds the evaluator


class Evaluator:
    """Runs a function over parameters, on any backend: submit, gather, close.

    Made by :meth:`create`. Every method may be called from any thread, also from within a running event loop: nothing
    runs on the caller's loop. A failed job is a result, not an exception: ``gather`` never raises because a run
    function failed.

    Where a program runs as many processes (MPI), each of them creates the evaluator, and one drives. In the others,
    whose :attr:`is_master` is False, it is created when the one that drives has closed it: until then they serve. They
    open no storage and call no callbacks, and their evaluator is closed.

    Args:
        run_function: called as ``run_function(job)`` with a :class:`evalkit.RunningJob`; ``def`` or ``async def``.
        backend: not started yet.
        callbacks: called in this order.
        run_function_kwargs: further keyword arguments of the run function, sent to each worker once.
        storage: where records live, an instance or a URL; None keeps them in memory.
        search_id: of a search that exists in the storage; None creates one.
        job_timeout: seconds that a job may run, from its start; None for no limit.
        resources: lists of units by kind, such as ``{"gpu": ["0", "1"]}``. Each running job has one of each kind to
            itself, as ``job.resources``, and no more jobs run than there are units of any kind.
        retries: a :class:`evalkit.RetryPolicy`, or an int: so many more attempts after a crash or a loss.
        grace: seconds between asking a job to stop and ending it by force.
        output_timeout: seconds that the output of a job may take to be rebuilt in this program, where it came from
            another process and holds more than plain values, numbers and arrays; a job whose output takes longer fails.
            With a ``job_timeout`` also how long the output may take to arrive once the run has ended in time.
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
        resources: Mapping[str, Sequence[str | int]] | None = None,
        retries: int | RetryPolicy = 0,
        grace: float = 2.0,
        output_timeout: float = 30.0,
    ) -> None:
        if not backend.capabilities.same_memory:
            check_not_importing()
        check_run_function(run_function)
        check_seconds("job_timeout", job_timeout)
        check_seconds("grace", grace, zero=True)
        check_seconds("output_timeout", output_timeout)
        grace = min(grace, _LONGEST_GRACE)
        if job_timeout == math.inf:
            job_timeout = None
        if not isinstance(run_function_kwargs or {}, Mapping):
            raise TypeError(f"run_function_kwargs takes a mapping of keyword arguments, not {run_function_kwargs!r}")
        policy = RetryPolicy.of(retries)
        self._units = check_resources(resources)
        observers = check_callbacks(callbacks)
        if not backend.is_master:
            storage, search_id, observers = None, None, []
        self._run_function = run_function
        self._backend = backend
        self._owns_storage = isinstance(storage, str)
        try:
            self._storage = open_storage(storage)
        except BaseException as exc:
            backend.release(exc)
            raise
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
            self._slow_timers = Clock("evalkit-storage")  # for what may have to wait for the storage
            self._recorder = Recorder(self._storage, self._slow_timers)
            self._scheduler = Scheduler(
                backend,
                self._recorder,
                self._notifier,
                self._timers,
                epoch=self._epoch,
                retries=policy,
                job_timeout=job_timeout,
                output_timeout=output_timeout,
                grace=grace,
                resources=Resources(self._units) if self._units else None,
            )
            # Reentrant: where jobs run in the caller, the callbacks of a submit are called in it, and they may submit.
            self._submitting = threading.RLock()
            self._numbers = itertools.count()
            self._submitted = 0
            self._catching_up = threading.Lock()  # with what others have done
            self._budget = Budget(self._scheduler, self._timers)
            self._closing = threading.Lock()
            self._awaiter: Awaiter | None = None
            bound = partial(run_function, **run_function_kwargs) if run_function_kwargs else run_function
            backend.job_timeout = job_timeout
            backend.start(bound, self._scheduler.emit)
        except BaseException as exc:
            if self._owns_storage:
                self._storage.close()
            backend.release(exc)
            raise
        if not backend.is_master:
            self._budget.close(_SERVED)
            return
        self._notifier.inline = backend.runs_in_caller
        for callback in observers:
            callback.evaluator = self
        _open.add(self)
        plugins().announce(self)

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
            method_kwargs: ``num_workers`` (default 1; on some backends, all there are), the other arguments of
                :class:`Evaluator`, and the options of the backend.

        Raises:
            ValueError: an unknown method or keyword (names the close match, or the line that installs a known plugin),
                or a value that makes no sense.
            TypeError: the run function is not callable, or a keyword has the wrong type.
            StorageError: the storage cannot be opened, or has no search of that id.
            BackendError: the engine cannot start.
        """
        check_run_function(run_function)
        if not isinstance(method, str):
            raise TypeError(f"method takes the name of a backend, not {method!r}")
        if not isinstance(method_kwargs or {}, Mapping):
            raise TypeError(f"method_kwargs takes a mapping such as {{'num_workers': 4}}, not {method_kwargs!r}")
        backend, common = make_backend(method, method_kwargs or {})
        return cls(run_function, backend, **common)

    # -- submit and gather ----------------------------------------------------------------------------------------

    def submit(self, args_list: Iterable[Mapping[str, Any]]) -> list[Job]:
        """Submit one job for each mapping of parameters. Returns at once, from any thread.

        A lazy iterable is drawn as it goes, and its first jobs run while it still produces. A list is all or nothing:
        one entry that is not a mapping, or a maximum that it would pass, and nothing of it is submitted. Parameters are
        copied.

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
        self._budget.check_open()
        if type(args_list) is not list and not isinstance(entries_of(args_list), Sequence):
            clock = None if self._backend.runs_in_caller else self._slow_timers
            return Drawer(self._check_room, self._submit_all, clock).draw(args_list)
        return self._submit_all(parameters_of_all(list(args_list)))

    def _check_room(self, n: int) -> None:
        self._budget.check_room(n, self._submitted)

    def _submit_all(self, copies: list[dict[str, Any]]) -> list[Job]:
        """Submit jobs with these parameters, which are theirs: all of them or none, unless the storage fails."""
        with InterruptHeld(), self._submitting:
            self._check_room(len(copies))
            self._submitted += len(copies)  # callbacks may submit while this goes on
            jobs: list[Job] = []
            try:
                for chunk in chunks_of(copies):
                    jobs += self._admit(chunk, begun=bool(jobs))
            finally:
                self._submitted -= len(copies) - len(jobs)
            return jobs

    def _admit(self, copies: list[dict[str, Any]], *, begun: bool) -> list[Job]:
        """Create the jobs of these parameters and start what can start."""
        ids = self._storage.create_jobs(self._search_id, copies, owner=self._owner)
        scheduler = self._scheduler
        # The ids come first, so that no number is drawn in vain.
        now = scheduler.clock()
        rows = zip(ids, copies, self._numbers, strict=False)
        jobs = [Job(job_id, args, number, now, scheduler) for job_id, args, number in rows]
        try:
            scheduler.admit(jobs, begun=begun)
        except SearchStoppedError as exc:
            self._withdraw(jobs, str(exc))
            self._check_room(0)
            raise
        return jobs

    def _withdraw(self, jobs: list[Job], reason: str) -> None:
        """The search ended while these were created: nobody will ever run them, and their records have to say so."""
        for job in jobs:
            job.move(JobState.CANCELLING, reason)
            job.finish(JobState.CANCELLED)
        self._recorder.note((), jobs)

    def gather(self, type: Literal["ALL", "BATCH"], size: int = 1) -> list[Job]:
        """Wait for jobs and return them: each job exactly once, whoever gathers.

        Args:
            type: ``"ALL"``: every job that is out at the time of the call, in the order of submission. ``"BATCH"``: at
                least ``size`` jobs, and whatever else has finished, in the order in which they ended.
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
        if not is_int(size) or size < 1:
            raise ValueError(f"gather takes a size of at least 1, not {size!r}")
        self._budget.check_open()
        if self._notifier.in_callback:
            raise GatherInCallbackError("a callback cannot gather: it would wait for itself; gather in the loop")
        waiter = AllWaiter() if type == "ALL" else BatchWaiter(size)
        try:
            self._scheduler.wait(waiter)
            if isinstance(waiter, BatchWaiter) and 0 < waiter.out < size:
                fewer = waiter.out
                warnings.warn(f"gather('BATCH', {size}) with {fewer} jobs out: waited for {fewer}", stacklevel=2)
            return self._hand_over(waiter.jobs)
        except BaseException:
            self._scheduler.undo(waiter)
            raise

    def _hand_over(self, jobs: list[Job]) -> list[Job]:
        """What has to be true before jobs are returned: they are durable, and the callbacks have seen them."""
        if not jobs:
            return jobs
        self._recorder.flush()
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
        self._budget.check_open()
        with self._catching_up:
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

        An await that is cancelled, as by ``asyncio.timeout``, gathers nothing: the job stays with the evaluator,
        and the next gather, or another ``execute``, returns it. A job that was given as parameters is cancelled then,
        since nobody holds it; the next gather returns it as well.

        Returns:
            the job, ended and in the storage; no later ``gather`` returns it. An await that is under way when the
            evaluator is closed returns the job as well, which is CANCELLED if it had not ended.

        Raises:
            EvaluatorClosedError: parameters are given after ``close``.
        """
        # Here, since asyncio takes a third of the time that evalkit takes to import.
        from evalkit.engine.awaiting import Awaiter

        if self._awaiter is None:
            lend = self._backend.runs_in_caller
            scheduler = self._scheduler
            self._awaiter = Awaiter(self.submit, scheduler.take, scheduler.put_back, self._hand_over, lend)
            if self._budget.closed:
                self._awaiter.close()
        return await self._awaiter.execute(job)

    # -- budget ---------------------------------------------------------------------------------------------------

    @property
    def timeout(self) -> float | None:
        """The budget of the search, in seconds from when it was set; None for no limit.

        When it is over, nothing more can be submitted, what waits is cancelled, and what runs is asked to stop, then
        ended.
        """
        return self._budget.timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        check_seconds("timeout", seconds)
        if self.is_master:
            self._budget.set_timeout(seconds)

    @property
    def time_left(self) -> float:
        """Seconds until the timeout, at least 0.0; ``math.inf`` without one."""
        return self._budget.time_left

    def set_maximum_num_jobs_submitted(self, n: int | None) -> None:
        """Let at most ``n`` jobs be submitted in all; the submit that would pass it raises. None is no limit."""
        if n is not None and (not is_int(n) or n < 0):
            raise ValueError(f"the maximum number of jobs is an int of at least 0, or None, not {n!r}")
        with self._submitting:
            self._budget.maximum = n

    def stop(self, reason: str, *, running: bool = True) -> None:
        """Take nothing more in, cancel what waits, ask what runs to stop, then end it. ``gather`` returns them all.

        Args:
            reason: for the stop message of what is cancelled, and for who submits.
            running: False lets what runs come to its end, before a deadline for instance; a later ``stop`` or the end
                of :attr:`timeout` may still end it.
        """
        self._budget.stop(reason, running=running)

    @property
    def stop_reason(self) -> str | None:
        """Why nothing more can be submitted; None as long as it can."""
        return self._budget.stop_reason

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
        return self._scheduler.gathered

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
        check_callbacks([callback])
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
            "timeout": None if self.timeout == math.inf else self.timeout,
            "job_timeout": self._job_timeout,
            "resources": {kind: list(units) for kind, units in self._units.items()} or None,
            "num_jobs_submitted": self._submitted,
            "num_jobs_gathered": self.num_jobs_gathered,
            "is_master": self.is_master,
            "closed": self._budget.closed,
        }

    def __repr__(self) -> str:
        state = "closed" if self._budget.closed else f"{self._submitted} submitted, {self.num_jobs_gathered} gathered"
        return f"<Evaluator on {type(self._backend).__name__}, search {self._search_id!r}, {state}>"

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> list[Job]:
        """Cancel what is out, give what runs its grace, write what is not written, release everything.

        Returns within the grace and a few seconds, whatever the jobs do. Calling it again does nothing.

        Returns:
            the jobs that it cancelled; a ``gather`` that waits in another thread ends, and returns them as well.

        Raises:
            StorageUnavailableError: the last results cannot be stored; all else is released.
        """
        return self._close(None)

    def _close(self, exc: BaseException | None) -> list[Job]:
        """As :meth:`close`; ``exc`` is what has left the ``with`` block."""
        if self._notifier.in_callback:
            raise GatherInCallbackError("a callback cannot close the evaluator: it would wait for itself; call stop()")
        with self._closing:
            if self._budget.closed:
                return []
            with InterruptHeld(lambda: self._scheduler.kill_all(_CLOSED)):
                return self._end(exc)

    def _end(self, exc: BaseException | None) -> list[Job]:
        self._budget.close()
        try:
            unfinished = self._scheduler.close_intake(_CLOSED)
            self._backend.stop(self._grace)
        finally:
            self._scheduler.give_up(_CLOSED)
            self._timers.close()
            self._slow_timers.close()
            try:
                # A submit that was under way says of its jobs that they were withdrawn; that is written too.
                if self._submitting.acquire(timeout=_LAST_SUBMIT):
                    self._submitting.release()
                self._recorder.flush()
            finally:
                try:
                    self._notifier.close()
                    if self._owns_storage:
                        self._storage.close()
                finally:
                    _open.discard(self)
                    if self._awaiter is not None:
                        self._awaiter.close()
                    self._backend.release(exc)
        return [job for job in unfinished if job.state is JobState.CANCELLED]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(exc)

    def _disown(self) -> None:
        """Let go, in a fork of the process that owns it: everything it holds is the other one's."""
        self._closing = threading.Lock()  # the other may have held it
        self._budget.closed = True


@atexit.register
def _close_what_is_open() -> None:
    """Whoever forgets to close leaves no process behind."""
    with contextlib.ExitStack() as stack:  # one that raises leaves the others their turn
        for evaluator in list(_open):
            stack.callback(evaluator.close)


def _disown_all() -> None:
    for evaluator in list(_open):
        evaluator._disown()
    _open.clear()


os.register_at_fork(after_in_child=_disown_all)


def _job_of(record: JobRecord) -> Job:
    """A job that ended elsewhere, as a handle."""
    job = Job(record.id, record.args, number=record.number)
    job.restore(
        record.state, record.output, record.error, record.cause, record.attempt, record.records, record.metadata
    )
    return job
