"""The conformance suite of backends: outputs and records whose pickles do something else than bring a value."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalkit import Evaluator, JobCause, JobState
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, eventually, in_background

__all__ = ["BackendOutputs"]

Make = Callable[..., Evaluator]

_LIMIT = 0.5  # seconds


class BackendOutputs(BackendFixtures):
    """What comes from a worker harms the job that it is of, and no other."""

    def _need_rebuilding(self) -> None:
        self.need(not self.can.same_memory, "memory of its own, so nothing is rebuilt")

    @pytest.mark.parametrize("how", ["raises", "exits", "is interrupted", "has no memory"])
    def test_an_output_that_cannot_be_rebuilt_fails_its_job(self, make: Make, how: str) -> None:
        self._need_rebuilding()
        evaluator = make(_misbehave, num_workers=2)
        jobs = evaluator.submit([{"how": how} if x == 3 else {"x": x} for x in range(8)])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
        bad = jobs.pop(3)
        assert (bad.state, bad.cause) == (JobState.FAILED, JobCause.EXCEPTION)
        assert type(_ERRORS[how]).__name__ in str(bad.error)
        assert {job.state for job in jobs} == {JobState.DONE}

    @pytest.mark.parametrize("how", ["hangs", "loops"])
    def test_an_output_that_takes_for_ever_fails_its_job_alone(self, make: Make, how: str) -> None:
        self._need_rebuilding()
        evaluator = make(_misbehave, num_workers=2, output_timeout=_LIMIT)
        jobs = evaluator.submit([{"how": how}, *({"x": x} for x in range(8))])
        # While it is being rebuilt, everything else goes on.
        assert all(in_background(job.wait, BOUND).result(BOUND) for job in jobs[1:])
        jobs += in_background(evaluator.submit, [{"x": 8}]).result(BOUND)
        assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
        bad = jobs.pop(0)
        assert (bad.state, bad.cause) == (JobState.FAILED, JobCause.EXCEPTION)
        assert f"output_timeout={_LIMIT:g} s" in str(bad.error)
        assert {job.state for job in jobs} == {JobState.DONE}

    def test_an_output_that_takes_for_ever_does_not_hold_up_the_end(self, make: Make) -> None:
        self._need_rebuilding()
        evaluator = make(_misbehave, num_workers=2, output_timeout=BOUND)
        (job, other) = evaluator.submit([{"how": "hangs"}, {"x": 1}])
        other.wait(BOUND)
        start = time.monotonic()
        in_background(evaluator.close).result(BOUND)
        assert time.monotonic() - start < BOUND / 2
        assert (job.state, other.state) == (JobState.CANCELLED, JobState.DONE)

    @pytest.mark.parametrize("how", ["raises", "hangs"])
    def test_a_record_that_cannot_be_rebuilt_says_so_in_its_place(self, make: Make, how: str) -> None:
        self._need_rebuilding()
        evaluator = make(_record_what_misbehaves, output_timeout=_LIMIT)
        (job,) = evaluator.submit([{"how": how}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.output) == (JobState.DONE, "done")
        before, bad, after = job.records
        assert (before, after) == ({"step": 0}, {"step": 2})
        assert "could not be rebuilt" in bad["evalkit_error"]

    @pytest.mark.parametrize("output", ["a plain value", "an object"])
    def test_slow_records_come_before_the_output(self, make: Make, output: str) -> None:
        """They are still being rebuilt when the output arrives."""
        self._need_rebuilding()
        evaluator = make(_record_what_is_slow)
        (job,) = evaluator.submit([{"output": output}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert job.state is JobState.DONE
        assert [(record["step"], type(record["value"]).__name__) for record in job.records] == [
            (step, "_SlowToRebuild") for step in range(3)
        ]

    @pytest.mark.parametrize("output", ["a plain value", "an object"])
    def test_a_run_that_is_over_is_done_though_the_search_is_stopped(self, make: Make, output: str) -> None:
        """What it recorded is still being rebuilt at that time."""
        self._need_rebuilding()
        evaluator = make(_record_what_is_slow, num_workers=1)
        # There is one worker: when the second job has ended, so has the run of the first.
        job, after = evaluator.submit([{"output": output}, {"output": "a plain value", "records": 0}])
        assert in_background(after.wait, BOUND).result(BOUND)
        evaluator.stop("enough")
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, len(job.records)) == (JobState.DONE, 3)

    def test_a_crash_behind_slow_records_is_no_timeout(self, make: Make) -> None:
        self._need_rebuilding()
        self.need(self.can.isolates_crashes, "process for each job")
        evaluator = make(_record_what_is_slow, job_timeout=_LIMIT)
        (job,) = evaluator.submit([{"output": "none, since it dies"}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.cause) == (JobState.FAILED, JobCause.CRASH)

    def test_the_time_of_a_job_ends_when_its_function_returns(self, make: Make) -> None:
        """What it takes to send the output and to rebuild it is not the job's."""
        self._need_rebuilding()
        evaluator = make(_take_long_to_pickle, job_timeout=1.5)
        evaluator.submit([{"seconds": 0.0}])  # whose time may have the start of the worker in it
        in_background(evaluator.gather, "ALL").result(BOUND)
        (job,) = evaluator.submit([{"seconds": 2.5}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.error, job.state, job.cause) == (None, JobState.DONE, None)
        assert job.metadata["duration"] < 1.5

    def test_an_output_that_never_arrives_fails_its_job(self, make: Make) -> None:
        self._need_rebuilding()
        self.need(self.can.kills_running, "way to end a job")
        evaluator = make(_take_long_to_pickle, job_timeout=1.5, output_timeout=_LIMIT)
        evaluator.submit([{"seconds": 0.0}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        (job,) = evaluator.submit([{"seconds": 2 * BOUND}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)

    def test_nothing_is_rebuilt_while_a_lock_is_held(self, make: Make, tmp_path: Path) -> None:
        """An object that is slow to rebuild looks at its evaluator meanwhile."""
        self._need_rebuilding()
        evaluator = make(_misbehave, num_workers=2)
        told: list[Any] = []

        def look() -> None:
            told.append((evaluator.num_jobs_gathered, evaluator.submit([{"x": 1}])))
            evaluator.backend.cancel("no such job", kill=False)

        _looks.append(look)
        try:
            evaluator.submit([{"how": "looks"}])
            eventually(lambda: told, "the end of the look")
            assert [job.state for job in in_background(evaluator.gather, "ALL").result(BOUND)] == [JobState.DONE] * 2
        finally:
            _looks.clear()


_ERRORS: dict[str, BaseException] = {
    "raises": ValueError("not here"),
    "exits": SystemExit(3),
    "is interrupted": KeyboardInterrupt(),
    "has no memory": MemoryError(),
}
_looks: list[Callable[[], None]] = []


class _Misbehaving:
    """Does something when it is rebuilt in another process than the one that made it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.how, os.getpid())


def _rebuild(how: str, pid: int) -> Any:
    if os.getpid() == pid:
        return _Misbehaving(how)
    if how in _ERRORS:
        raise _ERRORS[how]
    if how == "looks":
        # In a thread of its own, and waited for: a lock that this one holds would be a deadlock.
        looking = threading.Thread(target=_looks[-1], daemon=True)
        looking.start()
        looking.join(BOUND)
    while how == "hangs":
        time.sleep(0.01)
    while how == "loops":
        pass
    return how


def _misbehave(job: Any) -> Any:
    return _Misbehaving(job["how"]) if "how" in job else job["x"]


def _record_what_misbehaves(job: Any) -> str:
    job.record(step=0)
    job.record(value=_Misbehaving(job["how"]))
    job.record(step=2)
    return "done"


class _SlowToRebuild:
    """Takes a while to be rebuilt in another process than the one that made it."""

    def __init__(self, pid: int | None = None) -> None:
        if pid not in (None, os.getpid()):
            time.sleep(_LIMIT / 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return _SlowToRebuild, (os.getpid(),)


def _record_what_is_slow(job: Any) -> Any:
    for step in range(job.get("records", 3)):
        job.record(step=step, value=_SlowToRebuild())
    if job["output"] == "none, since it dies":
        os._exit(3)
    return _SlowToRebuild() if job["output"] == "an object" else job["output"]


class _SlowToPickle:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        time.sleep(self.seconds)
        return _SlowToPickle, (self.seconds,)


def _take_long_to_pickle(job: Any) -> Any:
    return _SlowToPickle(job["seconds"])
