"""The conformance suite of backends: what is told of the runs, event by event, as the evaluator hears it."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest

from evalkit import Evaluator, JobState, RetryPolicy
from evalkit.backends import (
    Backend,
    Cancelled,
    Done,
    DonePickled,
    Event,
    Failed,
    Lost,
    RunFunction,
    Task,
)
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, eventually, in_background

__all__ = ["BackendEvents"]

Make = Callable[..., Evaluator]


class BackendEvents(BackendFixtures):
    """Each run is told of from its start to exactly one end, in order, with no lock held."""

    def test_every_run_is_told_of_from_its_start_to_one_end(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        told = _Told(self.traits.backend, monkeypatch)
        evaluator = make(functions.end_somehow, num_workers=2, retries=RetryPolicy(exception=1))
        jobs = evaluator.submit([{"how": how} for how in ["return", "raise"] * 5])
        jobs += evaluator.submit([{"how": functions.WontLoad()}, {"how": "return"}])
        jobs[-1].cancel()
        gathered = in_background(evaluator.gather, "ALL")
        eventually(lambda: gathered.done() or told.stuck_for > BOUND / 2, "the end of the jobs")
        assert gathered.done(), "emit() was called while holding a lock that cancel() waits for"
        assert gathered.result() == jobs
        for job in jobs:
            evaluator.backend.cancel(job.id, kill=True)
        evaluator.backend.cancel("no such job", kill=True)
        (later,) = evaluator.submit([{"how": "return"}])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [later]
        evaluator.close()
        assert later.is_success, "a cancel of what is unknown or has ended is ignored"
        assert [job.state for job in jobs[:10]] == [JobState.DONE, JobState.FAILED] * 5
        told.check(may={job.id for job in (*jobs, later)}, must={job.id for job in (*jobs[:-1], later)})

    def test_a_request_for_an_unknown_job_is_not_kept(self, make: Make) -> None:
        evaluator = make(functions.ask)
        (first,) = evaluator.submit([{}])
        evaluator.gather("ALL")
        search, _, number = first.id.rpartition(".")
        evaluator.backend.cancel(f"{search}.{int(number) + 1}", kill=False)
        evaluator.backend.cancel(first.id, kill=False)  # as one for an attempt that has just ended, before the next one
        (second,) = evaluator.submit([{}])
        evaluator.gather("ALL")
        assert (second.id, second.output) == (f"{search}.{int(number) + 1}", False)


class _Told:
    """Listens to what a backend of this class is given and tells, from the start of the next one on."""

    def __init__(self, backend_class: type[Backend], monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, list[str]] = defaultdict(list)
        self._since: dict[int, float] = {}  # thread -> when it called back from an emit
        start, dispatch = backend_class.start, backend_class.dispatch

        def listening_start(
            backend: Backend, run_function: RunFunction, emit: Callable[[Sequence[Event]], None]
        ) -> None:
            def listening_emit(events: Sequence[Event]) -> None:
                self._hear(backend, events)
                emit(events)

            start(backend, run_function, listening_emit)

        def listening_dispatch(backend: Backend, tasks: Sequence[Task]) -> None:
            with self._lock:
                for task in tasks:
                    self._of[task.id].append(_DISPATCHED)
            dispatch(backend, tasks)

        monkeypatch.setattr(backend_class, "start", listening_start)
        monkeypatch.setattr(backend_class, "dispatch", listening_dispatch)

    def _hear(self, backend: Backend, events: Sequence[Event]) -> None:
        with self._lock:
            for event in events:
                self._of[event.job_id].append(type(event).__name__)
        thread = threading.get_ident()
        self._since[thread] = time.monotonic()
        backend.cancel("no such job", kill=False)  # as the evaluator may
        self._since.pop(thread, None)  # it may have been in there twice

    @property
    def stuck_for(self) -> float:
        """For how long a call of ``cancel`` from within ``emit`` has not returned, in seconds."""
        return max((time.monotonic() - since for since in list(self._since.values())), default=0.0)

    def check(self, *, may: set[str], must: set[str]) -> None:
        """Hold what was told to the contract.

        Args:
            may: the jobs that it may be about.
            must: those of them that it has to be about; one that was cancelled may never have been dispatched.
        """
        assert must <= set(self._of) <= may
        for job_id, told in self._of.items():
            story = f"{job_id}: {', '.join(told)}"
            runs = False
            for event in told:
                assert runs == (event != _DISPATCHED), f"{event} of what {'runs' if runs else 'has ended'}: {story}"
                runs = event not in _ENDS
            assert not runs, f"no end: {story}"


_DISPATCHED = "Task"
_ENDS = {end.__name__ for end in (Done, DonePickled, Failed, Cancelled, Lost)}
