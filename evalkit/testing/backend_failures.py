"""The conformance suite of backends: a failed job is a result, and it is the right job that fails."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from evalkit import Evaluator, Job, JobCause, JobState, RetryPolicy
from evalkit.errors import EvalkitError, JobFailedError
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, Files, eventually, gathering, in_background
from evalkit.testing.processes import runs

__all__ = ["BackendCrashes", "BackendExceptions", "BackendRetries", "BackendTimeouts"]

Make = Callable[..., Evaluator]


class BackendExceptions(BackendFixtures):
    """Whatever a run function raises makes that job FAILED/EXCEPTION, and no other."""

    def test_every_kind_of_exception_is_a_result(self, make: Make) -> None:
        evaluator = make(functions.throw, num_workers=2)
        kinds = list(functions.EXCEPTIONS)
        jobs = evaluator.submit([{"kind": kind} for kind in kinds])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
        for kind, job in zip(kinds, jobs, strict=True):
            assert (job.state, job.cause, job.output) == (JobState.FAILED, JobCause.EXCEPTION, None), kind
            assert job.error is not None
            assert job.error.type.rpartition(".")[2] == functions.EXCEPTIONS[kind]
            if kind != "unreadable":
                assert ", in throw" in job.error.traceback, f"{kind}: the remote traceback leads to the user's line"
        (again,) = evaluator.submit([{"kind": "value"}])
        assert evaluator.gather("ALL") == [again]
        assert str(again.error) == "ValueError: a plain one"

    def test_the_chain_of_causes_is_in_the_traceback(self, make: Make) -> None:
        evaluator = make(functions.throw)
        (job,) = evaluator.submit([{"kind": "chain"}])
        evaluator.gather("ALL")
        assert job.error is not None
        assert "the cause below" in job.error.traceback
        assert "the one above" in job.error.traceback

    def test_results_of_failed_jobs_raise_with_the_remote_traceback(self, make: Make) -> None:
        evaluator = make(functions.throw)
        (job,) = evaluator.submit([{"kind": "arguments"}])
        evaluator.gather("ALL")
        for read in (job.get_results, job.result):
            with pytest.raises(JobFailedError, match=r"(?s)code 7 in here.*in throw") as caught:
                read()
            assert caught.value.job is job

    def test_the_others_go_on(self, make: Make) -> None:
        evaluator = make(functions.throw_odd, num_workers=2)
        jobs = evaluator.submit([{"x": x} for x in range(100)])
        evaluator.gather("ALL")
        assert [job.output for job in jobs if job.is_success] == list(range(0, 100, 2))
        assert [job.args["x"] for job in jobs if job.is_failed] == list(range(1, 100, 2))

    def test_an_output_that_does_not_pickle(self, make: Make) -> None:
        evaluator = make(functions.lock_in_output)
        evaluator.submit([{}, {}])
        for job in evaluator.gather("ALL"):
            if self.can.same_memory:
                assert job.output["fine"] == 1
            else:
                assert (job.state, job.cause) == (JobState.FAILED, JobCause.EXCEPTION)
                assert "output['model']['lock']" in str(job.error), "it names the culprit"

    def test_an_output_that_does_not_unpickle(self, make: Make) -> None:
        evaluator = make(functions.unloadable)
        (job,) = evaluator.submit([{}])
        evaluator.gather("ALL")
        if self.can.same_memory:
            assert isinstance(job.output, functions.WontLoad)
        else:
            assert (job.state, job.cause) == (JobState.FAILED, JobCause.EXCEPTION)
            assert "it does not load here" in str(job.error)

    def test_arguments_that_do_not_travel(self, make: Make) -> None:
        evaluator = make(functions.reveal)
        bad: list[dict[str, Any]] = [{"x": {"lock": threading.Lock()}}, {"x": functions.WontLoad()}]
        jobs = evaluator.submit([{"x": 0}, *bad, {"x": 1}])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
        assert [job.is_success for job in jobs] == [True, self.can.same_memory, self.can.same_memory, True]
        if not self.can.same_memory:
            assert "args['x']['lock']" in str(jobs[1].error), "it names the culprit"
            assert "it does not load here" in str(jobs[2].error)

    def test_a_function_that_does_not_travel(self, make: Make) -> None:
        lock = threading.Lock()

        def with_lock(_job: Any) -> bool:
            return lock.locked()

        if self.can.same_memory:
            evaluator = make(with_lock)
            evaluator.submit([{}])
            assert [job.output for job in evaluator.gather("ALL")] == [False]
            return
        try:
            evaluator = make(with_lock)
        except EvalkitError as exc:
            assert "lock" in str(exc)  # noqa: PT017 - one of two ways of saying it
            return
        evaluator.submit([{}, {}])
        for job in in_background(evaluator.gather, "ALL").result(BOUND):
            assert (job.state, job.cause) == (JobState.FAILED, JobCause.EXCEPTION)
            assert "lock" in str(job.error)


class BackendCrashes(BackendFixtures):
    """A job that takes its process down takes no other job along."""

    @pytest.mark.parametrize(
        ("how", "code", "signal"), [("exit", 3, None), ("abort", None, "SIGABRT"), ("kill", None, "SIGKILL")]
    )
    def test_exactly_the_job_that_crashed_fails(
        self, make: Make, how: str, code: int | None, signal: str | None
    ) -> None:
        self.need(self.can.isolates_crashes, "isolation of crashes")
        evaluator = make(functions.die, num_workers=2)
        evaluator.submit([{"x": x, "how": how if x == 10 else None} for x in range(20)])
        jobs = in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.output for job in jobs] == [None if x == 10 else x for x in range(20)]
        crashed = jobs[10]
        assert (crashed.state, crashed.cause) == (JobState.FAILED, JobCause.CRASH)
        assert crashed.error is not None
        if self.says_how_workers_die:
            assert (crashed.error.exit_code, crashed.error.signal) == (code, signal)
        assert {job.attempt for job in jobs} == {0}, "nobody ran twice"
        evaluator.submit([{"x": x} for x in range(10)])
        assert [job.output for job in in_background(evaluator.gather, "ALL").result(BOUND)] == list(range(10))

    def test_many_crashes_among_many_jobs(self, make: Make) -> None:
        self.need(self.can.isolates_crashes, "isolation of crashes")
        evaluator = make(functions.die, num_workers=2)
        evaluator.submit([{"x": x, "how": "exit" if x % 10 == 0 else None} for x in range(100)])
        jobs = in_background(evaluator.gather, "ALL").result(2 * BOUND)
        assert [job.args["x"] for job in jobs if job.cause is JobCause.CRASH] == list(range(0, 100, 10))
        assert [job.output for job in jobs if job.is_success] == [x for x in range(100) if x % 10]

    def test_all_workers_crash_at_once(self, make: Make) -> None:
        self.need(self.can.isolates_crashes, "isolation of crashes")
        evaluator = make(functions.die, num_workers=2)
        evaluator.submit([{"x": 0, "how": "kill"}] * 4)
        assert [job.cause for job in in_background(evaluator.gather, "ALL").result(BOUND)] == [JobCause.CRASH] * 4
        (job,) = evaluator.submit([{"x": 1}])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [job]
        assert job.output == 1

    def test_a_job_that_runs_beside_a_crash_is_unharmed(self, make: Make, files: Files) -> None:
        self.need(self.can.isolates_crashes, "isolation of crashes")
        evaluator = make(functions.die_beside, num_workers=2)
        unharmed, crashed = evaluator.submit([files.holder("a"), {"after": files["a.started"], **files.holder("b")}])
        with gathering(evaluator):
            pid = files.wait_started("b")
            eventually(lambda: not runs(pid), "the crash")
            files.release("a")
        assert (crashed.state, crashed.cause) == (JobState.FAILED, JobCause.CRASH)
        assert (unharmed.state, unharmed.output, unharmed.attempt) == (JobState.DONE, "unharmed", 0)
        assert unharmed.records == [{"step": 0}, {"step": 1}], "also if it had to run again"

    def test_what_a_crashed_job_recorded_is_kept(self, make: Make) -> None:
        self.need(self.can.isolates_crashes and self.can.streams, "isolation of crashes with streams")
        evaluator = make(functions.fail_with_records)
        (job,) = evaluator.submit([{"how": "exit"}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert job.cause is JobCause.CRASH
        assert job.records == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.5}]


class BackendRetries(BackendFixtures):
    """The same job runs again, as often as the policy says for that cause."""

    def test_exceptions_are_tried_again_as_often_as_the_policy_says(self, make: Make) -> None:
        evaluator = make(functions.fail_at_first, num_workers=2, retries=RetryPolicy(exception=2))
        jobs = evaluator.submit([{"times": times} for times in (0, 1, 2, 3)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.output for job in jobs] == [0, 1, 2, None]
        assert [job.attempt for job in jobs] == [0, 1, 2, 2] == [job.metadata["attempt"] for job in jobs]
        assert (jobs[3].cause, str(jobs[3].error)) == (JobCause.EXCEPTION, "ValueError: attempt 2")
        assert all(job.error is None for job in jobs[:3]), "nothing is left of attempts before a success"

    def test_another_attempt_waits_for_its_backoff(self, make: Make) -> None:
        evaluator = make(functions.fail_at_first, retries=RetryPolicy(exception=2, backoff=0.05))
        (job,) = evaluator.submit([{"times": 2}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.output) == (JobState.DONE, 2)

    def test_an_int_of_retries_is_for_crashes_not_for_exceptions(self, make: Make) -> None:
        evaluator = make(functions.fail_at_first, retries=3)
        (job,) = evaluator.submit([{"times": 1}])
        evaluator.gather("ALL")
        assert (job.state, job.attempt) == (JobState.FAILED, 0)

    def test_crashes_are_tried_again(self, make: Make) -> None:
        self.need(self.can.isolates_crashes, "isolation of crashes")
        evaluator = make(functions.die_at_first, num_workers=2, retries=1)
        jobs = evaluator.submit([{"times": times} for times in (0, 1, 2)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.output for job in jobs] == [0, 1, None]
        assert [job.attempt for job in jobs] == [0, 1, 1]
        assert jobs[2].cause is JobCause.CRASH
        assert [[one.cause for one in job.attempts] for job in jobs] == [[], [JobCause.CRASH], [JobCause.CRASH]]
        assert all(one.error and one.duration is not None for job in jobs for one in job.attempts)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a backend that abandons jobs warns of it
class BackendTimeouts(BackendFixtures):
    """``job_timeout`` counts from the start of a job, and ends it as far as the backend can."""

    def test_a_job_past_its_time_fails(self, make: Make, files: Files) -> None:
        if self.inline:
            self._check_inline(make)
            return
        evaluator = make(functions.hold, num_workers=2, job_timeout=0.5)
        (stuck,) = evaluator.submit([files.holder("stuck")])
        # Before it is released: who cannot be killed is abandoned.
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [stuck]
        assert (stuck.state, stuck.cause) == (JobState.FAILED, JobCause.TIMEOUT)
        assert stuck.error is not None
        assert "0.5 s" in stuck.error.message
        # It may have been ended before it came to say that it started.
        if self.can.isolates_crashes and self.can.kills_running and files.exists("stuck.started"):
            pid = files.wait_started("stuck")
            eventually(lambda: not psutil.pid_exists(pid), "the end of the process of the job")
        self._check_recovery(evaluator, {"x": 2})
        files.release("stuck")
        self._check_recovery(evaluator, {"x": 3})
        assert not (self.can.kills_running and files.exists("stuck.finished")), "it is dead, as the backend claims"
        assert (stuck.state, stuck.output) == (JobState.FAILED, None), "what an abandoned job still does is ignored"

    def _check_recovery(self, evaluator: Evaluator, args: dict[str, Any]) -> None:
        """Jobs run as before. Where nobody knows when a job starts, the start of a worker is part of its time, so that
        the first may be too slow.
        """
        tried: list[Job] = []
        while not tried or (tried[-1].cause is JobCause.TIMEOUT and len(tried) < 20):
            tried += evaluator.submit([args])
            assert in_background(evaluator.gather, "ALL").result(BOUND) == tried[-1:]
        assert tried[-1].is_success, tried

    def _check_inline(self, make: Make) -> None:
        evaluator = make(functions.nap, job_timeout=0.1)
        slow, quick = evaluator.submit([{"seconds": 0.4}, {"seconds": 0}])
        assert evaluator.gather("ALL") == [slow, quick]
        assert (slow.state, slow.cause) == (JobState.FAILED, JobCause.TIMEOUT), "noticed when the function returns"
        assert quick.is_success

    def test_the_time_counts_from_the_start(self, make: Make) -> None:
        evaluator = make(functions.nap, num_workers=1, job_timeout=1.0)
        evaluator.submit([{"seconds": 0.0}])  # whose time may have the start of the worker in it
        in_background(evaluator.gather, "ALL").result(BOUND)
        jobs = evaluator.submit([{"seconds": 0.35}] * 4)
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.state for job in jobs] == [JobState.DONE] * 4, "together they took longer than one may"

    def test_a_program_that_cannot_run_for_a_while_fails_no_job(self, make: Make) -> None:
        evaluator = make(functions.nap, num_workers=2, job_timeout=0.75)
        evaluator.submit([{"seconds": 0.0}] * 2)
        in_background(evaluator.gather, "ALL").result(BOUND)
        jobs = evaluator.submit([{"seconds": 0.25}] * 2)
        with gathering(evaluator):
            time.sleep(0.1)
            ctypes.PyDLL(None).usleep(1_500_000)  # no other thread of this process runs meanwhile
        assert [(job.state, job.cause) for job in jobs] == [(JobState.DONE, None)] * 2

    def test_a_job_that_heeds_the_request_keeps_what_it_recorded(self, make: Make, files: Files) -> None:
        self.need(self.can.streams, "stop requests")
        evaluator = make(functions.heed, job_timeout=0.3, grace=BOUND)
        (job,) = evaluator.submit([files.holder("a")])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)
        assert job.records == [{"step": 0}, {"step": 1}]

    def test_what_an_abandoned_attempt_still_says_is_not_said_by_the_next(self, make: Make, files: Files) -> None:
        self.need(self.can.streams and not self.can.kills_running and not self.inline, "jobs to abandon that are heard")
        evaluator = make(functions.linger, num_workers=2, job_timeout=2.0, retries=RetryPolicy(timeout=1))
        (job,) = evaluator.submit([{"again": files["again"], "said": files["said"]}])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [job]
        assert (job.output, job.attempt, job.records) == ("the second", 1, [{"step": 1}])
        assert job.status.phase == "the second"

    def test_what_a_job_has_started_ends_with_it(self, make: Make, files: Files) -> None:
        self.need(self.can.kills_running and self.can.isolates_crashes, "way to kill the processes of a job")
        self.need(self.kills_children, "hold on what jobs start")
        evaluator = make(functions.start_children, job_timeout=3.0)
        (job,) = evaluator.submit([files.holder("a")])
        pids = [int(pid) for pid in files.wait("a.started").split()]
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)
        eventually(lambda: not any(map(runs, pids)), "the end of all that the job had started")

    def test_another_attempt_is_not_asked_to_stop_for_the_one_before(self, make: Make) -> None:
        evaluator = make(functions.late_at_first, job_timeout=0.5, grace=BOUND, retries=RetryPolicy(timeout=1))
        (job,) = evaluator.submit([{"seconds": 1.0}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.state, job.attempt, job.output) == (JobState.DONE, 1, False)

    def test_timeouts_are_tried_again_if_the_policy_says_so(self, make: Make) -> None:
        self.need(self.can.kills_running or self.inline, "way to end a job")
        evaluator = make(functions.nap, num_workers=2, job_timeout=0.2, retries=RetryPolicy(timeout=1))
        (slow,) = evaluator.submit([{"seconds": 0.5 if self.inline else BOUND}])
        with gathering(evaluator):
            pass
        assert (slow.state, slow.cause, slow.attempt) == (JobState.FAILED, JobCause.TIMEOUT, 1)
        self._check_recovery(evaluator, {"seconds": 0})
