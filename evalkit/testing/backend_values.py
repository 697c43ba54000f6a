"""The conformance suite of backends: what goes in, what comes out, and what is known of a job afterwards."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import functools
import itertools
import math
import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from evalkit import Evaluator, JobCause, JobState, call_with_kwargs
from evalkit.errors import BackendError, EvalkitError
from evalkit.job import JobMetadata
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, in_background

__all__ = ["BackendFunctions", "BackendValues"]

Make = Callable[..., Evaluator]

_LARGE = 20 * 2**20  # bytes


class BackendValues(BackendFixtures):
    """Arguments and outputs arrive as they were sent."""

    def test_outputs_that_mean_something(self, make: Make) -> None:
        evaluator = make(functions.return_kind, num_workers=2)
        kinds = ["none", "nan", "inf", "failed", "word", "pair", "mapping", "huge", "bytes", "nested"]
        jobs = dict(zip(kinds, evaluator.submit([{"kind": kind} for kind in kinds]), strict=True))
        evaluator.gather("ALL")
        assert {job.state for job in jobs.values()} == {JobState.DONE}, "a failed objective is not a failed job"
        assert math.isnan(jobs["nan"].output)
        objectives = {kind: job.objective for kind, job in jobs.items() if kind != "nan"}
        assert objectives == {
            "none": None,
            "inf": -math.inf,
            "failed": "F_diverged",
            "word": None,
            "pair": (1.0, 2),
            "mapping": 3.5,
            "huge": 10**400,
            "bytes": None,
            "nested": None,
        }
        assert [kind for kind, job in jobs.items() if job.objective_failed] == ["nan", "inf", "failed"]
        assert jobs["mapping"].metadata["epochs"] == 7
        assert (jobs["bytes"].output, jobs["nested"].output) == (b"\0\xff", {"a": [{"b": (1, {2})}]})

    def test_objects(self, make: Make) -> None:
        evaluator = make(functions.make_point)
        (job,) = evaluator.submit([{"point": functions.Point(1)}])
        evaluator.gather("ALL")
        assert type(job.output) is functions.Point
        assert job.output == functions.Point(2)

    @pytest.mark.parametrize("kind", [bytes, bytearray])
    def test_large_arguments_and_outputs(self, make: Make, kind: type) -> None:
        evaluator = make(functions.big, num_workers=2)
        data = kind(b"head" + os.urandom(2**20) * (_LARGE // 2**20) + b"tail")
        jobs = evaluator.submit([{"data": data}, {"data": kind(b"headtail")}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.error for job in jobs] == [None, None]
        assert (jobs[0].output["type"], jobs[0].output["length"]) == (kind.__name__, len(data))
        assert type(jobs[0].output["data"]) is kind
        assert jobs[0].output["data"] == data
        assert jobs[1].output["length"] == 8

    @pytest.mark.parametrize("n", [3, 2**20])
    def test_arrays_arrive_as_their_own(self, make: Make, n: int) -> None:
        numpy = pytest.importorskip("numpy")
        evaluator = make(functions.add_one, num_workers=2)
        given = numpy.arange(n, dtype=float)
        (job,) = evaluator.submit([{"array": given.copy()}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert job.error is None, "it can be written to, however it came"
        assert numpy.array_equal(job.output, given + 1)
        job.output[0] = 7.0

    def test_jobs_see_the_objects_of_this_process_or_copies(self, make: Make) -> None:
        evaluator = make(functions.mark)
        point = functions.Point(1)
        (job,) = evaluator.submit([{"point": point}])
        evaluator.gather("ALL")
        assert job.output.x == -1
        assert point.x == (-1 if self.can.same_memory else 1)
        assert (job.output is point) == self.can.same_memory

    def test_sizes_around_every_buffer(self, make: Make) -> None:
        evaluator = make(functions.big, num_workers=2)
        sizes = [8, *(2**n + d for n in (12, 16, 18, 20) for d in (-200, -100, -16, -1, 0, 1, 16))]
        jobs = evaluator.submit([{"data": b"head" + bytes(size - 8) + b"tail"} for size in sizes])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.error for job in jobs] == [None] * len(sizes)
        assert [len(job.output["data"]) for job in jobs] == sizes

    def test_a_job_that_changes_its_parameters_changes_nothing_outside(self, make: Make) -> None:
        evaluator = make(functions.meddle)
        given = {"x": 1, "gone": 2, "nested": {"list": [1]}}
        jobs = [*evaluator.submit([given]), *evaluator.submit([given])]
        evaluator.gather("ALL")
        assert [job.output for job in jobs] == [str(["added", "nested", "x"])] * 2
        for args in (given, jobs[0].args, jobs[1].args):
            assert (args["x"], args["gone"], "added" in args) == (1, 2, False)
            if not self.can.same_memory:
                assert args["nested"] == {"list": [1]}

    def test_what_is_known_of_a_job_afterwards(self, make: Make) -> None:
        evaluator = make(functions.reveal, num_workers=2)
        jobs = evaluator.submit([{"x": x} for x in range(20)])
        evaluator.gather("ALL")
        for job in jobs:
            known = job.metadata
            times = [known[f"timestamp_{name}"] for name in ("submit", "start", "end", "gather")]
            assert all(later > earlier - 0.01 for earlier, later in itertools.pairwise(times)), times
            assert -0.01 < times[0] <= times[3] < 2 * BOUND, "they count from the creation of the evaluator"
            assert known["duration"] == pytest.approx(times[2] - times[1])
            assert (known["pid"], known["attempt"]) == (job.output["pid"], 0)
            assert isinstance(known["worker"], str)
            if not self.can.spans_nodes:
                assert known["host"] == socket.gethostname()
            if self.can.same_memory:
                assert known["pid"] == os.getpid()
            assert known.get("cpu_time", 0.0) >= 0.0
            assert known.get("peak_rss", 2**20) >= 2**20
            assert list(known) == [key for key in JobMetadata.KEYS if key in known]
            status = job.status
            assert status.start_timestamp is not None
            assert status.end_timestamp is not None
            assert status.creation_timestamp <= status.end_timestamp
            assert status.duration >= status.running_time >= 0.0
        assert len({job.metadata["worker"] for job in jobs}) <= 2


class BackendFunctions(BackendFixtures):
    """Every kind of run function, and what is given to it besides the parameters."""

    def test_call_with_kwargs(self, make: Make) -> None:
        evaluator = make(call_with_kwargs(functions.add))
        jobs = evaluator.submit([{"x": 1}, {"x": 1, "y": 2}, {"z": 3}])
        evaluator.gather("ALL")
        assert [job.output for job in jobs] == [11, 3, None]
        assert "TypeError" in str(jobs[2].error)

    def test_run_function_kwargs(self, make: Make) -> None:
        evaluator = make(functions.add_offset, run_function_kwargs={"offset": 100.0, "scale": 2.0})
        jobs = evaluator.submit([{"x": 1}, {"x": 2}])
        evaluator.gather("ALL")
        assert [job.output for job in jobs] == [102.0, 104.0]

    def test_partials(self, make: Make) -> None:
        evaluator = make(functools.partial(self.prepare(functions.add_offset), offset=5.0))
        (job,) = evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        assert job.output == 6.0

    def test_lambdas_and_closures(self, make: Make) -> None:
        self.need(self.can.by_value, "functions by value")
        offset = [1000]

        def nested(job: Any) -> Any:
            return job["x"] + offset[0]

        for function in (nested, lambda job: job["x"] + offset[0]):
            evaluator = make(function)
            (job,) = evaluator.submit([{"x": 1}])
            evaluator.gather("ALL")
            assert job.output == 1001

    def test_what_cannot_be_imported_does_not_hang_where_it_does_not_travel(self, make: Make) -> None:
        self.need(not self.can.by_value, "lack of functions by value")
        try:
            evaluator = make(lambda job: job["x"])
        except EvalkitError as exc:
            assert "lambda" in str(exc)  # noqa: PT017 - one of two ways of saying it
            return
        (job,) = evaluator.submit([{"x": 1}])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [job]
        assert job.is_success or "lambda" in str(job.error), "it names what does not travel"

    @pytest.mark.parametrize("what", ["function", "argument"])
    def test_a_module_that_workers_cannot_import_is_named(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        self.need(not self.can.same_memory, "memory of its own in a worker")
        # It is here, so all travels by reference; there is no file that another process could import.
        module = types.ModuleType("module_of_the_user")
        exec("def double(job):\n    return job['x'] * 2\nclass Point: pass", vars(module))  # noqa: S102
        monkeypatch.setitem(sys.modules, module.__name__, module)
        try:
            evaluator = make(module.double if what == "function" else functions.echo)
        except EvalkitError as exc:
            assert module.__name__ in str(exc)  # noqa: PT017 - one of two ways of saying it
            return
        jobs = evaluator.submit([{"x": module.Point()}, {"x": 1}])
        assert in_background(evaluator.gather, "ALL").result(BOUND) == jobs
        assert (jobs[0].state, jobs[0].cause) == (JobState.FAILED, JobCause.EXCEPTION)
        assert f"No module named '{module.__name__}'" in str(jobs[0].error)
        assert jobs[1].is_success == (what == "argument"), "what can be imported runs"

    def test_an_argument_may_be_a_function(self, make: Make) -> None:
        self.need(self.can.by_value, "functions by value")
        evaluator = make(_apply)
        (job,) = evaluator.submit([{"function": lambda x: x * 3, "x": 5}])
        evaluator.gather("ALL")
        assert job.output == 15

    def test_worker_init_gives_each_worker_its_state(self, make: Make) -> None:
        self.need(self.traits.takes_worker_init, "worker_init")
        evaluator = make(functions.worker_state, num_workers=2, worker_init=functions.counting_init)
        jobs = evaluator.submit([{"x": x} for x in range(20)])
        evaluator.gather("ALL")
        states = {(job.output["pid"], job.output["thread"]) for job in jobs}
        assert 1 <= len(states) <= 2, "once in each worker"
        assert {pid for pid, _ in states} == {job.metadata["pid"] for job in jobs}

    def test_worker_init_that_raises_is_said_and_hangs_nobody(self, make: Make) -> None:
        self.need(self.traits.takes_worker_init, "worker_init")
        try:
            evaluator = make(functions.worker_state, num_workers=2, worker_init=functions.exploding_init)
        except BackendError as exc:
            assert "this worker cannot be had" in str(exc)  # noqa: PT017 - one of two ways of saying it
            return
        evaluator.submit([{"x": x} for x in range(5)])
        for job in in_background(evaluator.gather, "ALL").result(BOUND):
            assert (job.state, job.cause) == (JobState.FAILED, JobCause.EXCEPTION)
            assert "this worker cannot be had" in str(job.error)


def _apply(job: Any) -> Any:
    return job["function"](job["x"])
