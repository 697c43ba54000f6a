"""The conformance suite of backends: resources, of which each running job has its own."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from evalkit import Evaluator, Job, JobCause, JobState, RetryPolicy
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, Files, gathering, in_background

__all__ = ["BackendResources"]

Make = Callable[..., Evaluator]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a backend that abandons jobs warns of it
class BackendResources(BackendFixtures):
    """``resources``: a job runs on units that no other has meanwhile, is told which, and they are recorded."""

    def test_each_job_has_its_units_to_itself(self, make: Make, files: Files) -> None:
        units = {"gpu": ["0", "1"], "license": ["a", "b", "c"]}
        evaluator = make(functions.occupy, num_workers=2, resources=units)
        jobs = evaluator.submit([{"units": files["units"], "x": x} for x in range(30)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [str(job.error) for job in jobs if job.error] == []
        for job in jobs:
            assert job.output["resources"] == job.metadata["resources"] == job.resources
            assert (job.resources["gpu"] in units["gpu"], job.resources["license"] in units["license"]) == (True, True)

    def test_what_libraries_see_is_what_is_recorded(self, make: Make, files: Files) -> None:
        evaluator = make(functions.occupy, num_workers=2, resources={"gpu": ["6", "7"]})
        jobs = evaluator.submit([{"units": files["units"], "x": x} for x in range(12)])
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
        assert [str(job.error) for job in jobs if job.error] == []
        if self.can.same_memory and not self.inline:
            assert {job.output["visible"] for job in jobs} == {before}, "the environment belongs to all"
        else:
            assert [job.output["visible"] for job in jobs] == [job.metadata["resources"]["gpu"] for job in jobs]

    def test_no_more_jobs_run_than_there_are_units(self, make: Make, files: Files) -> None:
        self.need(not self.inline, "jobs beside one another")
        evaluator = make(functions.await_others, num_workers=2, resources={"gpu": [0], "license": [0, 1]})
        names = ("a", "b", "c")
        jobs = evaluator.submit([{**files.holder(name), "others": files["others"]} for name in names])
        with gathering(evaluator):
            files.wait_started("a")
            files.release_all()
        assert [job.state for job in jobs] == [JobState.DONE] * 3
        assert [job.output for job in jobs] == [1] * 3, "two ran at once on one unit"

    def test_units_come_back_however_a_job_ends(self, make: Make, files: Files) -> None:
        retries = RetryPolicy(exception=1, crash=1)
        evaluator = make(functions.end_in_some_way, num_workers=2, resources={"gpu": ["0"]}, retries=retries)
        ways = ["return", "raise", "raise at first", "exit", "unknown output"]
        if self.can.isolates_crashes:
            ways += ["die", "die at first"]
        jobs = evaluator.submit([{"way": way} for way in ways * 2])
        dropped = evaluator.submit([{"way": "return"}])[0]
        dropped.cancel()
        last = evaluator.submit([{"way": "return"}])[0]
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert all(job.is_complete for job in jobs)
        assert (last.state, last.resources) == (JobState.DONE, {"gpu": "0"})
        assert dropped.state is JobState.CANCELLED
        assert "resources" not in dropped.metadata, "it never ran"
        for job in jobs:
            if job.args["way"].endswith("at first"):
                assert job.is_success
                assert [one.resources for one in job.attempts] == [{"gpu": "0"}]
            assert job.metadata.get("resources") == {"gpu": "0"}

    def test_a_cancelled_job_gives_its_unit_back(self, make: Make, files: Files) -> None:
        self.need(self.can.streams and not self.inline, "stop requests beside the caller")
        evaluator = make(functions.heed, num_workers=2, resources={"gpu": ["0"]}, grace=BOUND)
        first, second = evaluator.submit([files.holder("first"), files.holder("second")])
        with gathering(evaluator):
            files.wait_started("first")
            first.cancel()
            files.wait_started("second")
            files.release_all()
        assert (first.state, second.state) == (JobState.CANCELLED, JobState.DONE)
        assert first.metadata["resources"] == second.metadata["resources"] == {"gpu": "0"}

    def test_a_run_keeps_its_unit_until_it_is_really_over(self, make: Make, files: Files) -> None:
        """Where a job past its time is killed, the next runs at once; where it is abandoned, only when it returns."""
        self.need(not self.inline, "jobs beside the caller")
        evaluator = make(functions.follow, num_workers=2, resources={"gpu": ["0"]}, job_timeout=1.0)
        over = files["over"]
        first, second = evaluator.submit([files.holder("first", over=over), {"before": over}])
        with gathering(evaluator):
            assert first.wait(BOUND)
            if not self.can.kills_running:
                files.release("first")
        assert first.cause is JobCause.TIMEOUT
        assert first.metadata["resources"] == {"gpu": "0"}
        if (
            second.cause is not JobCause.TIMEOUT
        ):  # where nobody knows when a job starts, its worker may start too slowly
            assert (second.state, second.resources) == (JobState.DONE, {"gpu": "0"})
            # Of a process that was killed there is no such sign.
            assert second.output or (self.can.kills_running and self.can.isolates_crashes), "it started too early"

    def test_bad_resources_are_refused(self) -> None:
        bad: list[Any] = [
            ["0", "1"],
            "gpu",
            {"gpu": []},
            {"gpu": "0,1"},
            {"gpu": ["0", "0"]},
            {"gpu": [0, "0"]},
            {"gpu": 2},
            {"gpu": [None]},
            {"gpu": [""]},
            {"": ["0"]},
            {0: ["0"]},
            {"gpu": {"0", "1"}},
        ]
        for resources in bad:
            with pytest.raises(ValueError, match="resources"):
                self.create(functions.echo, resources=resources).close()

    def test_close_gives_up_what_has_units(self, make: Make, files: Files) -> None:
        evaluator = make(functions.hold, num_workers=2, resources={"gpu": ["0"]})
        jobs = evaluator.submit([files.holder("a"), files.holder("b")])
        cancelled: list[Job] = in_background(evaluator.close).result(BOUND)
        assert cancelled == jobs
