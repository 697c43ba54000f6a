"""The conformance suite of backends: jobs that are watched, cancelled and stopped, and the end of the evaluator."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from evalkit import CancelOutcome, Evaluator, Job, JobState
from evalkit.errors import EvaluatorClosedError, JobCancelledError, SearchStoppedError
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, Files, eventually, gathering, in_background

__all__ = ["BackendCancel", "BackendEnd", "BackendReports"]

Make = Callable[..., Evaluator]


class BackendReports(BackendFixtures):
    """Progress and records, while a job runs where the backend streams, with its result where it does not."""

    def test_progress_and_records_arrive_while_the_job_runs(self, make: Make, files: Files) -> None:
        evaluator = make(functions.tell)
        (job,) = evaluator.submit([{f"go{stage}": files[f"go{stage}"] for stage in range(3)}])
        with gathering(evaluator):
            for stage in range(3):
                if self.can.streams:
                    reported = functools.partial(_has_phase, job, f"stage {stage}")
                    eventually(reported, f"the report of stage {stage}")
                    status = job.status
                    assert (status.progress, status.running, status.completed) == (stage / 4, True, False)
                    assert job.records == [{"stage": before} for before in range(stage + 1)]
                files.create(f"go{stage}")
        assert job.output == "told"
        assert job.records == [{"stage": 0}, {"stage": 1}, {"stage": 2}]
        assert (job.status.progress, job.status.phase, job.status.success) == (1.0, "stage 2", True)

    def test_what_a_job_prints_is_its_log(self, make: Make, files: Files) -> None:
        self.need(self.traits.captures and sys.platform == "linux", "option 'capture'")
        evaluator = make(functions.chatter, num_workers=2)
        jobs = evaluator.submit([{"x": x, **files.holder(str(x))} for x in range(2)])
        with gathering(evaluator):
            for x, job in enumerate(jobs):
                files.wait_started(str(x))
                eventually(functools.partial(_has_printed, job, "started"), "what it has printed so far")
                files.release(str(x))
        assert [job.log for job in jobs] == [f"{x} started\nfrom a child\n{x} released\n" for x in range(2)]
        assert [evaluator.storage.load_log(job.id) for job in jobs] == [job.log for job in jobs]
        quiet = make(functions.chatter, capture=False)
        (job,) = quiet.submit([{"x": 0, **files.holder("0")}])
        quiet.gather("ALL")
        assert (job.state, job.log) == (JobState.DONE, "")

    def test_records_outlive_an_exception(self, make: Make) -> None:
        evaluator = make(functions.fail_with_records)
        (job,) = evaluator.submit([{"how": "raise"}])
        evaluator.gather("ALL")
        assert job.is_failed
        assert job.records == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.5}]

    def test_progress_is_kept_between_0_and_1(self, make: Make) -> None:
        evaluator = make(functions.report_too_far)
        (job,) = evaluator.submit([{}])
        evaluator.gather("ALL")
        assert (job.output, job.status.progress, job.status.phase) == (False, 1.0, "far")

    def test_progress_that_is_no_number_fails_the_job(self, make: Make) -> None:
        evaluator = make(functions.report_nan)
        (job,) = evaluator.submit([{}])
        evaluator.gather("ALL")
        assert "NaN" in str(job.error)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a backend that abandons jobs warns of it
class BackendCancel(BackendFixtures):
    """``job.cancel()`` says what it did, and does it."""

    def test_a_job_that_waits_never_runs(self, make: Make, files: Files) -> None:
        evaluator = make(functions.hold, num_workers=1)
        first, second, third = evaluator.submit([files.holder("first"), files.holder("second"), {"x": 3}])
        with gathering(evaluator) as gathered:
            files.wait_started("first")
            outcome = second.cancel()
            if self.takes_back:
                assert outcome is CancelOutcome.CANCELLED
                assert second.state is JobState.CANCELLED
                assert second.cancel() is CancelOutcome.TOO_LATE
            files.release_all()
        assert gathered.result() == [first, second, third]
        assert [job.state for job in gathered.result()] == [JobState.DONE, JobState.CANCELLED, JobState.DONE]
        assert not (self.takes_back and files.exists("second.started"))
        with pytest.raises(JobCancelledError, match="cancelled by the user"):
            second.get_results()

    def test_all_that_wait_can_be_cancelled(self, make: Make, files: Files) -> None:
        evaluator = make(functions.hold, num_workers=1)
        first, *rest = evaluator.submit([files.holder("first"), *({"x": x} for x in range(200))])
        with gathering(evaluator):
            files.wait_started("first")
            outcomes = {job.cancel() for job in rest}
            assert CancelOutcome.CANCELLED in outcomes
            assert not self.takes_back or len(outcomes) == 1
            files.release("first")
        assert first.is_success
        assert {job.state for job in rest} == {JobState.CANCELLED}

    def test_a_job_that_runs_is_asked_to_stop(self, make: Make, files: Files) -> None:
        self.need(self.can.streams, "stop requests")
        evaluator = make(functions.heed, grace=BOUND)
        (job,) = evaluator.submit([files.holder("a")])
        with gathering(evaluator) as gathered:
            files.wait_started("a")
            eventually(lambda: job.is_running, "the start of the job")
            assert job.cancel() is CancelOutcome.REQUESTED
        assert gathered.result() == [job]
        assert job.state is JobState.CANCELLED
        assert job.records == [{"step": 0}, {"step": 1}], "it stopped by itself"
        assert job.status.stop_message == "cancelled by the user"
        assert job.cancel() is CancelOutcome.TOO_LATE

    def test_a_job_that_no_request_reaches_is_ended(self, make: Make, files: Files) -> None:
        self.need(not self.can.streams, "jobs that cannot be reached while they run")
        evaluator = make(functions.heed)
        (job,) = evaluator.submit([files.holder("a")])
        files.wait_started("a")
        eventually(lambda: job.is_running, "the start of the job")
        assert job.cancel() is CancelOutcome.REQUESTED
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [job]
        assert (job.state, job.output) == (JobState.CANCELLED, None)
        assert {"step": 1} not in job.records, "it did not stop by itself"

    def test_a_job_that_does_not_listen_is_ended(self, make: Make, files: Files) -> None:
        self.need(not self.inline, "way to end what runs in the caller's own thread")
        evaluator = make(functions.hold, num_workers=2)
        deaf, other = evaluator.submit([files.holder("deaf"), {"x": 1}])
        pid = files.wait_started("deaf")
        eventually(lambda: deaf.is_running, "the start of the job")
        assert deaf.cancel() is CancelOutcome.REQUESTED
        assert deaf.cancel() is CancelOutcome.REQUESTED
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [deaf, other]
        assert (deaf.state, deaf.error, deaf.cause) == (JobState.CANCELLED, None, None)
        if self.can.isolates_crashes and self.can.kills_running:
            eventually(lambda: not psutil.pid_exists(pid), "the end of the process of the job")
        (later,) = evaluator.submit([{"x": 2}])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [later]
        assert later.output == 2

    def test_a_job_inline_is_cancelled_when_it_returns(self, make: Make, files: Files) -> None:
        self.need(self.inline, "jobs in the caller's own thread")
        evaluator = make(functions.hold)
        (job,) = evaluator.submit([files.holder("a")])
        with gathering(evaluator):
            files.wait_started("a")
            assert job.cancel() is CancelOutcome.REQUESTED
            assert job.state is JobState.CANCELLING
            files.release("a")
        assert job.status.canceled

    def test_a_job_that_has_ended_stays_as_it_is(self, make: Make) -> None:
        evaluator = make(functions.echo)
        (job,) = evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        assert job.cancel() is CancelOutcome.TOO_LATE
        assert (job.state, job.output) == (JobState.DONE, {"x": 1})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a backend that abandons jobs warns of it
class BackendEnd(BackendFixtures):
    """Budgets, ``stop``, ``close`` and what comes after; nothing hangs and nothing is left behind."""

    @pytest.mark.parametrize("how", ["timeout", "stop"])
    def test_when_the_search_ends_all_jobs_come_back_cancelled(self, make: Make, files: Files, how: str) -> None:
        evaluator = make(functions.heed if self.can.streams else functions.hold, num_workers=1, grace=1.0)
        jobs = evaluator.submit([files.holder("a"), *(files.holder(f"never{i}") for i in range(5))])
        with gathering(evaluator) as gathered:
            files.wait_started("a")
            assert evaluator.time_left == math.inf
            if how == "timeout":
                evaluator.timeout = 0.05
            else:
                evaluator.stop("enough")
            eventually(lambda: jobs[-1].is_complete, "the end of the jobs that wait")
            if self.inline and not self.can.streams:
                files.release("a")
        assert gathered.result() == jobs
        assert {job.state for job in jobs} == {JobState.CANCELLED}
        if self.can.streams:
            assert jobs[0].records == [{"step": 0}, {"step": 1}]
        assert not any(files.exists(f"never{i}.started") for i in range(5))
        message = "the timeout of 0.05 s has passed" if how == "timeout" else "enough"
        assert {job.status.stop_message for job in jobs} == {message}
        with pytest.raises(SearchStoppedError, match=message):
            evaluator.submit([{"x": 1}])
        assert evaluator.stop_reason == message
        assert evaluator.gather("ALL") == []

    def test_close_with_work_running_is_bounded(self, make: Make, files: Files) -> None:
        evaluator = make(functions.hold, num_workers=2)
        jobs = evaluator.submit([files.holder("a"), files.holder("b"), *({"x": x} for x in range(50))])
        if not self.inline:
            files.wait_started("a")
        cancelled = in_background(evaluator.close).result(BOUND)
        assert {job.state for job in jobs} <= {JobState.CANCELLED, JobState.DONE}
        assert sorted(map(id, cancelled)) == sorted(id(job) for job in jobs if job.state is JobState.CANCELLED)
        assert {"a", "b"} <= {os.path.basename(job.args.get("started", "")).partition(".")[0] for job in cancelled}

    def test_close_lets_a_job_that_listens_end_by_itself(self, make: Make, files: Files) -> None:
        self.need(self.can.streams and not self.inline, "stop requests beside the caller")
        evaluator = make(functions.heed, grace=BOUND)
        (job,) = evaluator.submit([files.holder("a")])
        files.wait_started("a")
        assert in_background(evaluator.close).result(BOUND) == [job]
        assert job.records == [{"step": 0}, {"step": 1}]

    def test_close_twice_and_use_after_close(self, make: Make) -> None:
        evaluator = make(functions.echo)
        (job,) = evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        assert evaluator.close() == []
        assert evaluator.close() == []
        uses: list[Callable[[], Any]] = [
            lambda: evaluator.submit([{"x": 2}]),
            lambda: evaluator.gather("ALL"),
            lambda: evaluator.gather("BATCH"),
            evaluator.gather_other_jobs_done,
        ]
        for use in uses:
            with pytest.raises(EvaluatorClosedError):
                use()
        assert (job.output, job.cancel()) == ({"x": 1}, CancelOutcome.TOO_LATE)

    def test_close_ends_a_gather_in_another_thread(self, make: Make, files: Files) -> None:
        self.need(not self.inline, "jobs beside the caller")
        evaluator = make(functions.hold)
        (job,) = evaluator.submit([files.holder("a")])
        gathered = in_background(evaluator.gather, "ALL")
        files.wait_started("a")
        in_background(evaluator.close).result(BOUND)
        with contextlib.suppress(EvaluatorClosedError):  # it came too late to be served
            assert gathered.result(BOUND) == [job]
        assert job.state is JobState.CANCELLED

    def test_close_in_a_with_block_that_raises(self) -> None:
        jobs: list[Job] = []

        def fail() -> None:
            with self.create(functions.echo) as evaluator:
                jobs.extend(evaluator.submit([{"x": 1}]))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert jobs[0].is_complete


def _has_phase(job: Job, phase: str) -> bool:
    return job.status.phase == phase


def _has_printed(job: Job, text: str) -> bool:
    return text in job.log
