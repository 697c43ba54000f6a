"""The evaluator: what create refuses, budgets, gathers, parameters, storages that fail, callbacks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import math
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evalkit import Callback, Evaluator, Job, JobState, RetryPolicy, RunningJob, call_with_kwargs
from evalkit.backends import Backend, Cancelled, Done, Progress, Recorded, Started
from evalkit.backends.thread import ThreadBackend
from evalkit.engine import recorder
from evalkit.engine.clock import Clock
from evalkit.errors import (
    EvaluatorClosedError,
    GatherInCallbackError,
    MaximumJobsSpawnReached,
    ParametersError,
    SearchNotFoundError,
    SearchStoppedError,
    StorageUnavailableError,
    StorageURLError,
    UnknownPluginError,
)
from evalkit.storage.base import JobUpdate, Storage
from evalkit.storage.memory import MemoryStorage
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, in_background

hold = functions.Plain(functions.hold)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.release_all()


def echo(job: RunningJob) -> Any:
    return job.get("x")


# -- create -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("proces", r"'proces', did you mean 'process'\?"),
        ("serail", r"did you mean 'serial'\?"),
        ("xyzzy", r"'xyzzy'; there are: .*process.*serial.*thread"),
        ("", "there are"),
    ],
)
def test_an_unknown_method_is_answered_with_the_close_match(method: str, words: str) -> None:
    with pytest.raises(UnknownPluginError, match=words) as caught:
        Evaluator.create(echo, method)
    assert isinstance(caught.value, ValueError)
    assert caught.value.plugin == method


def test_a_storage_that_is_not_installed_is_answered_with_those_that_are() -> None:
    with pytest.raises(StorageURLError, match=r"no storage for redis:// is installed; there are: .*sqlite"):
        Evaluator.create(echo, "serial", {"storage": "redis://localhost"})


@pytest.mark.parametrize(
    ("method", "name", "words"),
    [
        ("serial", "num_worker", "did you mean 'num_workers'"),
        ("process", "max_jobs_per_workers", "did you mean 'max_jobs_per_worker'"),
        ("thread", "max_jobs_per_worker", "backend 'thread' has no option 'max_jobs_per_worker'"),
        ("thread", "backend", "has no option 'backend'"),
        ("thread", "run_function", "has no option 'run_function'"),
        ("thread", "self", "has no option 'self'"),
        ("thread", 3, "has no option 3"),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_close_match(method: str, name: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Evaluator.create(echo, method, {name: 1})


@pytest.mark.parametrize("num_workers", [0, -1, 2.5, True, "2", None, math.nan])
def test_num_workers_that_make_no_sense(num_workers: Any) -> None:
    with pytest.raises(ValueError, match="num_workers takes an int of at least 1"):
        Evaluator.create(echo, "thread", {"num_workers": num_workers})


@pytest.mark.parametrize("function", [None, 3, "run", {}])
def test_a_run_function_that_is_not_callable(function: Any) -> None:
    with pytest.raises(TypeError, match="must be callable"):
        Evaluator.create(function)
    with pytest.raises(TypeError, match="must be callable"):
        Evaluator(function, ThreadBackend(1))


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("callbacks", [3], TypeError, "callback"),
        ("callbacks", [Callback], TypeError, "callback"),
        ("callbacks", Callback(), TypeError, "allback"),
        ("storage", 3, TypeError, "storage takes"),
        ("storage", "study.db", StorageURLError, "sqlite:///study.db"),
        ("storage", "sqlit:///study.db", StorageURLError, "did you mean 'sqlite'"),
        ("storage", "", StorageURLError, "URL"),
        ("search_id", "nowhere", SearchNotFoundError, "nowhere"),
        ("retries", -1, ValueError, "retries"),
        ("retries", 1.5, ValueError, "retries"),
        ("retries", True, ValueError, "retries"),
        ("retries", "2", ValueError, "retries"),
        ("job_timeout", 0, ValueError, "job_timeout"),
        ("job_timeout", -1, ValueError, "job_timeout"),
        ("job_timeout", "1", ValueError, "job_timeout"),
        ("job_timeout", True, ValueError, "job_timeout"),
        ("job_timeout", math.nan, ValueError, "job_timeout"),
        ("grace", -1, ValueError, "grace"),
        ("grace", None, ValueError, "grace"),
        ("run_function_kwargs", 3, TypeError, None),
        ("worker_init", 3, TypeError, "worker_init"),
    ],
)
def test_values_that_make_no_sense(name: str, value: Any, error: type[Exception], words: str | None) -> None:
    before = threading.active_count()
    with pytest.raises(error, match=words):
        Evaluator.create(echo, "thread", {name: value})
    assert threading.active_count() == before, "nothing was started"


@pytest.mark.parametrize("method", [None, 3, ThreadBackend])
def test_a_method_that_is_no_name(method: Any) -> None:
    with pytest.raises(TypeError, match="method"):
        Evaluator.create(echo, method)


def test_retry_policies_are_checked() -> None:
    with pytest.raises(ValueError, match="crash"):
        RetryPolicy(crash=-1)
    with pytest.raises(ValueError, match="backoff"):
        RetryPolicy(backoff=math.nan)


def test_a_search_goes_on_under_its_id() -> None:
    storage = MemoryStorage()
    with Evaluator.create(echo, "serial", {"storage": storage}) as first:
        first.submit([{"x": 1}])
        first.gather("ALL")
        search_id = first.search_id
    with Evaluator.create(echo, "serial", {"storage": storage, "search_id": search_id}) as second:
        (job,) = second.submit([{"x": 2}])
        second.gather("ALL")
        assert job.id == f"{search_id}.1"
        assert [other.output for other in second.gather_other_jobs_done()] == [1]
    with Evaluator.create(echo, "serial", {"storage": storage}) as third:
        assert third.search_id != search_id


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_a_maximum_is_exact_and_all_or_nothing() -> None:
    with Evaluator.create(echo, "thread") as evaluator:
        evaluator.set_maximum_num_jobs_submitted(5)
        evaluator.submit([{"x": x} for x in range(3)])
        for too_many in ([{"x": x} for x in range(3)], ({"x": x} for x in range(3)), iter(lambda: {"x": 1}, None)):
            with pytest.raises(MaximumJobsSpawnReached) as caught:
                evaluator.submit(too_many)
            assert (caught.value.maximum, caught.value.submitted) == (5, 3)
        assert evaluator.num_jobs_submitted == 3
        evaluator.submit([{"x": x} for x in range(2)])
        assert evaluator.submit([]) == []
        with pytest.raises(MaximumJobsSpawnReached):
            evaluator.submit([{"x": 1}])
        assert len(evaluator.gather("ALL")) == 5
        evaluator.set_maximum_num_jobs_submitted(None)
        evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")


def test_a_maximum_holds_under_many_submitters() -> None:
    with Evaluator.create(echo, "thread", {"num_workers": 2}) as evaluator:
        evaluator.set_maximum_num_jobs_submitted(100)

        def submit_until_full(n: int) -> int:
            taken = 0
            while True:
                try:
                    taken += len(evaluator.submit([{"x": 1}] * n))
                except MaximumJobsSpawnReached:
                    if n == 1:
                        return taken
                    n = 1

        with ThreadPoolExecutor(6) as threads:
            taken = list(threads.map(submit_until_full, (1, 2, 3, 5, 7, 1)))
        assert sum(taken) == 100 == evaluator.num_jobs_submitted == len(evaluator.gather("ALL"))


@pytest.mark.parametrize("n", [-1, 1.5, True, "3"])
def test_a_maximum_that_makes_no_sense(n: Any) -> None:
    with Evaluator.create(echo) as evaluator, pytest.raises(ValueError, match="maximum"):
        evaluator.set_maximum_num_jobs_submitted(n)


def test_the_time_that_is_left() -> None:
    with Evaluator.create(echo) as evaluator:
        assert (evaluator.timeout, evaluator.time_left) == (None, math.inf)
        evaluator.timeout = 100
        assert evaluator.timeout == 100
        assert 90 < evaluator.time_left <= 100
        evaluator.timeout = None
        assert (evaluator.timeout, evaluator.time_left) == (None, math.inf)
        for wrong in (0, -1, "3", True, math.nan):
            with pytest.raises(ValueError, match="timeout"):
                evaluator.timeout = wrong  # type: ignore[assignment]
        evaluator.timeout = 0.01
        eventually(lambda: evaluator.time_left == 0.0, "the end of the time")
        with pytest.raises(SearchStoppedError, match=r"the timeout of 0\.01 s has passed"):
            evaluator.submit([{"x": 1}])
        evaluator.timeout = 100
        evaluator.submit([{"x": 1}])  # it was given more


@pytest.mark.parametrize("seconds", [math.inf, 1e15])
def test_any_length_of_time_will_do(seconds: float, files: Files) -> None:
    with Evaluator.create(hold, "process", {"job_timeout": 0.3, "grace": 0.2}) as evaluator:
        evaluator.timeout = seconds
        (job,) = evaluator.submit([files.holder("a")])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert job.is_failed, "shorter times still pass"
    with Evaluator.create(echo, "thread", {"job_timeout": seconds}) as evaluator:
        (job,) = evaluator.submit([{"x": 1}])
        assert job.result(timeout=seconds) == 1


# -- gather and submit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["all", "batch", "", None, 1])
def test_a_type_of_gather_that_does_not_exist(type: Any) -> None:
    with Evaluator.create(echo) as evaluator, pytest.raises(ValueError, match="'ALL' or 'BATCH'"):
        evaluator.gather(type)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2", None])
def test_a_size_of_gather_that_makes_no_sense(size: Any) -> None:
    with Evaluator.create(echo) as evaluator, pytest.raises(ValueError, match="size of at least 1"):
        evaluator.gather("BATCH", size)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("x=1", "iterable of mappings"),
        (b"x", "iterable of mappings"),
        ({"x": 1}, r"submit\(\[\{\.\.\.\}\]\)"),
        (None, None),
        (5, None),
        ([{"x": 1}, 3], "entry 1 is int"),
        ([{"x": 1}, "ab"], "entry 1 is str"),
        ([{"x": 1}, [("x", 1)]], "entry 1 is list"),
        ([{"x": 1}, None], "entry 1 is NoneType"),
        ([{"x": 1}, {1: 2}], "entry 1 has 1"),
        ([{"x": 1}, {("a",): 2}], "entry 1 has"),
        ([{"x": 1}, {None: 2}], "entry 1 has None"),
    ],
)
def test_parameters_that_no_job_can_be_made_of(given: Any, words: str | None) -> None:
    with Evaluator.create(echo, "thread") as evaluator:
        with pytest.raises(ParametersError, match=words):
            evaluator.submit(given)
        assert evaluator.num_jobs_submitted == 0, "a list is all or nothing"
        assert evaluator.gather("ALL") == []


def test_what_an_iterable_gave_before_it_failed_is_submitted() -> None:
    def produce() -> Iterator[dict[str, Any]]:
        yield {"x": 1}
        yield {"x": 2}
        raise OSError("the file ends here")

    with Evaluator.create(echo, "thread") as evaluator:
        with pytest.raises(OSError, match="the file ends here"):
            evaluator.submit(produce())
        assert [job.output for job in evaluator.gather("ALL")] == [1, 2]


def test_the_first_job_of_a_slow_generator_starts_before_there_is_a_second(files: Files) -> None:
    with Evaluator.create(hold, "thread") as evaluator:

        def produce() -> Iterator[dict[str, Any]]:
            yield files.holder("first")
            files.wait_started("first")
            files.release("first")
            yield {"x": 2}

        evaluator.submit(produce())
        assert len(evaluator.gather("ALL")) == 2


def test_a_maximum_leaves_a_slow_generator_lazy(files: Files) -> None:
    with Evaluator.create(hold, "thread") as evaluator:
        evaluator.set_maximum_num_jobs_submitted(10)

        def produce() -> Iterator[dict[str, Any]]:
            deadline = time.monotonic() + BOUND
            yield files.holder("first")
            for x in range(9):
                while x == 5 and not files.exists("first.started"):
                    assert time.monotonic() < deadline, "nothing runs while the generator produces"
                    time.sleep(0.01)
                yield {"x": x}
                time.sleep(0.01)

        evaluator.submit(produce())
        files.release("first")
        assert len(evaluator.gather("ALL")) == 10


@pytest.mark.parametrize("how", ["timeout", "stop", "close"])
def test_the_end_of_a_search_ends_a_submit_that_is_under_way(how: str, files: Files) -> None:
    with Evaluator.create(hold, "thread") as evaluator:
        ended = threading.Event()

        def produce() -> Iterator[dict[str, Any]]:
            yield {"started": files["first"]}
            time.sleep(0.05)
            yield {"x": 0}
            files.wait("first")
            ended.wait(BOUND)
            time.sleep(0.05)
            for x in range(3):
                yield {"x": x, "started": files["late"]}
                time.sleep(0.03)

        submitting = in_background(evaluator.submit, (args for args in produce()))
        eventually(lambda: evaluator.num_jobs_submitted or submitting.done(), "the first job")
        if how == "timeout":
            evaluator.timeout = 0.01
            eventually(lambda: evaluator.stop_reason, "the end of the time")
        else:
            evaluator.stop("enough") if how == "stop" else evaluator.close()
        ended.set()
        with contextlib.suppress(SearchStoppedError, EvaluatorClosedError):
            submitting.result(BOUND)
        if how != "close":
            in_background(evaluator.gather, "ALL").result(BOUND)
        assert not files.exists("late"), "nothing starts after the end"


def test_a_generator_may_use_the_evaluator_itself() -> None:
    with Evaluator.create(echo, "thread") as evaluator:

        def produce() -> Iterator[dict[str, Any]]:
            (job,) = evaluator.submit([{"x": 1}])
            yield {"x": job.result(BOUND) + 1}

        in_background(lambda: evaluator.submit(produce())).result(BOUND)
        assert sorted(job.output for job in evaluator.gather("ALL")) == [1, 2]


def test_two_gatherers_each_get_as_many_as_they_asked_for(files: Files) -> None:
    with Evaluator.create(hold, "thread", {"num_workers": 2}) as evaluator:
        evaluator.submit([files.holder("a"), files.holder("b")])
        gathers = [in_background(evaluator.gather, "BATCH", 1) for _ in range(2)]
        for name in ("a", "b"):
            files.wait_started(name)
        eventually(lambda: len(evaluator._scheduler._waiters) == 2, "two who wait")
        files.release("a")
        eventually(lambda: any(gather.done() for gather in gathers), "the end of one gather")
        files.release("b")
        assert [len(gather.result(BOUND)) for gather in gathers] == [1, 1]


def test_all_waits_for_what_is_out_at_the_time_of_the_call(files: Files) -> None:
    with Evaluator.create(hold, "thread", {"num_workers": 2}) as evaluator:
        (early,) = evaluator.submit([files.holder("early")])
        gathered = in_background(evaluator.gather, "ALL")
        eventually(lambda: evaluator._scheduler._waiters, "the gather")
        (late,) = evaluator.submit([files.holder("late")])
        files.release("early")
        assert gathered.result(BOUND) == [early]
        files.release("late")
        assert evaluator.gather("ALL") == [late]


def test_parameters_are_the_jobs_own_from_submit_on(files: Files) -> None:
    config: dict[str, Any] = {"x": [0], "deep": {"a": (1, [2])}}
    with Evaluator.create(echo, "process") as evaluator:
        jobs = []
        for step in range(3):
            jobs += evaluator.submit([config])
            config["x"][0] += 1
            config["deep"]["a"][1].append(step)
        evaluator.gather("ALL")
        assert [job.output for job in jobs] == [[0], [1], [2]]
        assert [job.args["deep"]["a"][1] for job in jobs] == [[2], [2, 0], [2, 0, 1]]


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
@pytest.mark.parametrize("coroutine", [False, True])
def test_what_a_run_function_does_to_its_parameters_stays_with_it(method: str, coroutine: bool) -> None:
    function = functions.Coroutine(_spoil) if coroutine else _spoil
    given: dict[str, Any] = {"x": [0], "deep": {"a": [1]}}
    with Evaluator.create(function, method) as evaluator:
        (job,) = evaluator.submit([given])
        evaluator.gather("ALL")
        assert job.output == [0, 9]
        assert job.args == given == {"x": [0], "deep": {"a": [1]}}


def _spoil(job: RunningJob) -> Any:
    job["x"].append(9)
    job["deep"]["a"].clear()
    return job["x"]


@pytest.mark.parametrize("method", ["serial", "thread"])
def test_a_list_is_copied_before_the_first_of_its_jobs_is_seen(method: str) -> None:
    parameters = [{"x": x} for x in range(5000)]
    seen = threading.Event()

    class Changes(Callback):
        def on_launch(self, job: Job) -> None:
            parameters[-1]["x"] = "changed"
            seen.set()

    def run(job: RunningJob) -> Any:
        assert seen.wait(BOUND)
        return job["x"]

    with Evaluator.create(run, method, {"callbacks": [Changes()]}) as evaluator:
        evaluator.submit(parameters)
        assert [job.output for job in evaluator.gather("ALL")] == list(range(5000))


def test_no_job_of_a_slow_generator_waits_for_the_next(files: Files) -> None:
    with Evaluator.create(hold, "thread") as evaluator:

        def produce() -> Iterator[dict[str, Any]]:
            for name in ("a", "b", "c"):
                yield files.holder(name)
                files.release(name)
                files.wait_started(name)

        assert len(in_background(lambda: evaluator.submit(produce())).result(BOUND)) == 3
        assert len(evaluator.gather("ALL")) == 3


@pytest.mark.parametrize("how", ["stop", "close", "timeout"])
def test_jobs_that_are_created_while_the_search_ends_leave_no_record_that_waits(how: str) -> None:
    creating, ended = threading.Event(), threading.Event()

    class _Slow(MemoryStorage):
        def create_jobs(self, *args: Any, **kwargs: Any) -> list[str]:
            ids = super().create_jobs(*args, **kwargs)
            creating.set()
            ended.wait(BOUND)
            return ids

    storage = _Slow()
    with Evaluator.create(echo, "thread", {"storage": storage}) as evaluator:
        submitting = in_background(evaluator.submit, [{"x": 1}, {"x": 2}])
        assert creating.wait(BOUND)
        if how == "timeout":
            evaluator.timeout = 0.01
            eventually(lambda: evaluator._scheduler._closed_because, "the end of the time")
        elif how == "stop":
            evaluator.stop("enough")
        else:
            closing = in_background(evaluator.close)
            eventually(lambda: evaluator._scheduler._closed_because, "the end")
        ended.set()
        with pytest.raises(EvaluatorClosedError if how == "close" else SearchStoppedError):
            submitting.result(BOUND)
        assert evaluator.num_jobs_submitted == 0
        if how == "close":
            closing.result(BOUND)
    assert [record.state for record in storage.load_jobs(evaluator.search_id)] == [JobState.CANCELLED] * 2


def test_a_thousand_executes_on_serial() -> None:
    async def main() -> list[Job]:
        with Evaluator.create(echo, "serial") as evaluator:
            return list(await asyncio.gather(*(evaluator.execute({"x": x}) for x in range(1000))))

    jobs = in_background(asyncio.run, main()).result(BOUND)
    assert [job.output for job in jobs] == list(range(1000))


def test_to_execute_another_evaluators_job_takes_none_of_ours() -> None:
    with Evaluator.create(echo, "thread") as ours, Evaluator.create(echo, "thread") as other:
        (mine,) = ours.submit([{"x": 1}])
        (theirs,) = other.submit([{"x": 2}])
        assert mine.wait(BOUND)
        assert asyncio.run(ours.execute(theirs)) is theirs
        assert ours.gather("ALL") == [mine]
        assert other.gather("ALL") == [theirs]


def test_many_executes_leave_the_loops_threads_alone(files: Files) -> None:
    async def main() -> int:
        with Evaluator.create(hold, "thread", {"num_workers": 2}) as evaluator:
            waiting = [asyncio.create_task(evaluator.execute(files.holder(f"{i % 2}"))) for i in range(40)]
            while not files.exists("0.started"):
                await asyncio.sleep(0.01)
            for i in range(2):
                await asyncio.to_thread(files.release, f"{i}")
            return len(await asyncio.gather(*waiting))

    assert in_background(asyncio.run, main()).result(BOUND) == 40


def test_an_execute_that_is_cancelled_leaves_no_thread(files: Files) -> None:
    async def main(evaluator: Evaluator) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(evaluator.execute(files.holder("a")), 0.1)

    with Evaluator.create(hold, "thread") as evaluator:
        in_background(asyncio.run, main(evaluator)).result(10.0)  # while the job still runs
        files.release("a")
        assert len(evaluator.gather("ALL")) == 1


# -- what is said of it -----------------------------------------------------------------------------------------------


class _Callable:
    def __call__(self, job: RunningJob) -> int:
        return 1


@pytest.mark.parametrize(
    "function", [echo, lambda job: 1, functools.partial(echo), _Callable(), call_with_kwargs(functions.add)]
)
def test_to_json_is_json(function: Any) -> None:
    with Evaluator.create(function, "thread", {"num_workers": 2, "job_timeout": 5}) as evaluator:
        evaluator.timeout = 60
        evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        said = json.loads(json.dumps(evaluator.to_json(), allow_nan=False))
        assert said["num_workers"] == 2
        assert (said["num_jobs_submitted"], said["num_jobs_gathered"]) == (1, 1)
        assert (said["search_id"], said["timeout"], said["job_timeout"]) == (evaluator.search_id, 60, 5)
        assert isinstance(said["run_function"], str)
    assert evaluator.to_json()["closed"] is True
    assert "closed" in repr(evaluator)


def test_an_endless_time_is_json_too() -> None:
    with Evaluator.create(echo) as evaluator:
        evaluator.timeout = math.inf
        json.dumps(evaluator.to_json(), allow_nan=False)


def test_jobs_of_the_past_cost_little_memory() -> None:
    """What stays of a finished job, its record in the memory storage included, is at most 1.5 KB."""

    def run(n: int) -> None:
        for _ in range(n // 500):
            evaluator.submit([{"x": 1.5, "y": "adam"} for _ in range(500)])
            for job in evaluator.gather("ALL"):
                assert job.is_success

    with Evaluator.create(lambda job: job["x"], "serial") as evaluator:
        run(2000)
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            objects = len(gc.get_objects())
            run(10_000)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            grown = len(gc.get_objects()) - objects
        finally:
            tracemalloc.stop()
        assert (after - before) / 10_000 <= 1536
        assert grown / 10_000 <= 8
        scheduler = evaluator._scheduler
        for name in ("_out", "_pending", "_in_backend", "_finished", "_dooms", "_waiters"):
            assert not getattr(scheduler, name), f"{name} grows with history"


# -- storages ---------------------------------------------------------------------------------------------------------


def test_jobs_that_others_did_in_the_same_search() -> None:
    storage = MemoryStorage()
    seen: list[str] = []

    class _Seen(Callback):
        def on_done_other(self, job: Job) -> None:
            seen.append(job.id)

    with Evaluator.create(echo, "thread", {"storage": storage}) as first:
        second = Evaluator.create(
            echo, "thread", {"storage": storage, "search_id": first.search_id, "callbacks": [_Seen()]}
        )
        with second:
            mine = second.submit([{"x": 1}])
            theirs = first.submit([{"x": 2}, {"x": 3}])
            assert {*mine, *theirs} == {*second.gather("ALL"), *first.gather("ALL")}
            others = second.gather_other_jobs_done()
            assert [(job.id, job.output, job.args, job.state) for job in others] == [
                (job.id, job.output, job.args, JobState.DONE) for job in theirs
            ]
            assert others[0].metadata["pid"] == theirs[0].metadata["pid"]
            assert seen == [job.id for job in theirs]
            assert second.gather_other_jobs_done() == [], "each once"
            assert [job.output for job in first.gather_other_jobs_done()] == [1]
            first.submit([{"x": 4}])
            assert second.gather_other_jobs_done() == [], "only what has ended"
            first.gather("ALL")
            assert [job.output for job in second.gather_other_jobs_done()] == [4]


class _Away(MemoryStorage):
    """Refuses the first ``times`` writes of results."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
        if self.times > 0:
            self.times -= 1
            raise StorageUnavailableError("the disk is full")
        super().update_jobs(updates)

    end_jobs = Storage.end_jobs


def test_a_storage_that_is_away_for_a_while_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    storage = _Away(3)
    with Evaluator.create(echo, "thread", {"storage": storage}) as evaluator:
        jobs = evaluator.submit([{"x": x} for x in range(5)])
        with caplog.at_level(logging.WARNING, "evalkit"):
            assert evaluator.gather("ALL") == jobs
        assert storage.times == 0
        assert [record.output for record in storage.load_jobs(evaluator.search_id)] == [0, 1, 2, 3, 4]
    assert "not available" in caplog.text


def test_a_storage_that_stays_away_raises_and_the_results_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_PATIENCE", 0.1)
    storage = _Away(10**6)
    events: list[Sequence[Job]] = []

    class _Gathered(Callback):
        def on_gather(self, jobs: Sequence[Job]) -> None:
            events.append(jobs)

    with Evaluator.create(echo, "thread", {"storage": storage, "callbacks": [_Gathered()]}) as evaluator:
        jobs = evaluator.submit([{"x": x} for x in range(5)])
        for kind in ("ALL", "BATCH"):
            with pytest.raises(StorageUnavailableError, match="the disk is full"):
                evaluator.gather(kind)  # type: ignore[arg-type]
        assert (evaluator.num_jobs_gathered, events) == (0, [])
        storage.times = 0
        assert evaluator.gather("ALL") == jobs
        assert (evaluator.num_jobs_gathered, events) == (5, [jobs])
        assert len(storage.load_jobs(evaluator.search_id, states=[JobState.DONE])) == 5


def test_close_lets_go_of_everything_though_the_storage_is_away(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    monkeypatch.setattr(recorder, "_PATIENCE", 0.1)
    closed: list[str] = []

    class _Closed(Callback):
        def on_close(self) -> None:
            closed.append("closed")

    options = {"storage": _Away(10**6), "callbacks": [_Closed()], "grace": 0.1}
    evaluator = Evaluator.create(hold, "process", options)
    (job,) = evaluator.submit([files.holder("a")])
    files.wait_started("a")
    with pytest.raises(StorageUnavailableError):
        evaluator.close()
    assert (job.state, closed) == (JobState.CANCELLED, ["closed"])
    assert evaluator.close() == []


def test_a_storage_that_takes_no_jobs() -> None:
    class _Full(MemoryStorage):
        full = True

        def create_jobs(self, *args: Any, **kwargs: Any) -> list[str]:
            if self.full:
                raise StorageUnavailableError("the disk is full")
            return super().create_jobs(*args, **kwargs)

    storage = _Full()
    with Evaluator.create(echo, "thread", {"storage": storage}) as evaluator:
        evaluator.set_maximum_num_jobs_submitted(1)
        with pytest.raises(StorageUnavailableError):
            evaluator.submit([{"x": 1}])
        assert evaluator.num_jobs_submitted == 0
        storage.full = False
        evaluator.submit([{"x": 1}])
        assert [job.output for job in evaluator.gather("ALL")] == [1]


def test_what_was_gathered_is_in_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with caplog.at_level(logging.WARNING, "evalkit"), Evaluator.create(echo, "process", {"storage": url}) as evaluator:
        reader = Evaluator.create(echo, "serial", {"storage": url, "search_id": evaluator.search_id})
        with reader:
            for _ in range(30):
                jobs = evaluator.submit([{"x": x} for x in range(50)])
                evaluator.gather("BATCH", 50)
                others = reader.gather_other_jobs_done()
                assert [job.id for job in others] == [job.id for job in jobs]
                assert all(job.is_success for job in others)
    assert caplog.text == ""


def test_a_slow_storage_does_not_hold_up_timeouts(files: Files) -> None:
    writing = threading.Event()
    done = threading.Event()

    class _Slow(MemoryStorage):
        durable = True

        def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
            if not done.is_set():
                writing.set()
                done.wait(BOUND)
            super().update_jobs(updates)

        end_jobs = Storage.end_jobs

    with Evaluator.create(hold, "process", {"storage": _Slow(), "job_timeout": 0.5, "grace": 0.2}) as evaluator:
        (job,) = evaluator.submit([files.holder("a")])
        assert writing.wait(BOUND)
        try:
            assert job.wait(BOUND), "the job is ended though the storage writes"
        finally:
            done.set()
        evaluator.gather("ALL")


def test_a_job_that_ends_while_its_start_is_written_is_recorded_once(caplog: pytest.LogCaptureFixture) -> None:
    """The recorder takes what was noted, the job ends before it is read, and its end is noted only then."""
    storage, clock = MemoryStorage(), Clock()
    written = recorder.Recorder(storage, clock)
    job = Job(storage.create_jobs(storage.create_search(), [{}])[0], {})
    job.start(1.0)
    written.note([job], [])
    job.finish(JobState.DONE, output=1)
    written.flush()
    written.note([], [job])
    written.flush()
    written.flush()
    assert storage.load_jobs("0")[0].output == 1
    assert caplog.text == ""


# -- callbacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "error"),
    [
        *((method, error) for method in ("serial", "thread", "process") for error in (ValueError, SystemExit)),
        ("thread", KeyboardInterrupt),  # on serial it is in the caller's own thread, and the caller's
    ],
)
def test_a_callback_that_raises_is_named_and_breaks_nothing(
    method: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class _Broken(Callback):
        def on_done(self, job: Job) -> None:
            raise error("in the callback")

    with Evaluator.create(functions.echo, method, {"callbacks": [_Broken()]}) as evaluator:
        for _ in range(2):
            evaluator.submit([{"x": 1}, {"x": 2}])
            gathered = in_background(evaluator.gather, "ALL").result(BOUND)
            assert [job.state for job in gathered] == [JobState.DONE] * 2
    assert "_Broken" in caplog.text
    assert "on_done" in caplog.text


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_gather_and_close_in_a_callback_raise(method: str) -> None:
    errors: list[BaseException] = []

    class _Gathers(Callback):
        def on_done(self, job: Job) -> None:
            evaluator = self.evaluator
            assert isinstance(evaluator, Evaluator)
            for call in (lambda: evaluator.gather("ALL"), evaluator.close):
                try:
                    call()
                except GatherInCallbackError as exc:
                    errors.append(exc)

    with Evaluator.create(functions.echo, method, {"callbacks": [_Gathers()]}) as evaluator:
        evaluator.submit([{"x": 1}])
        assert len(in_background(evaluator.gather, "ALL").result(BOUND)) == 1
    assert len(errors) == 2


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
@pytest.mark.parametrize("event", ["on_launch", "on_progress", "on_done", "on_gather"])
def test_a_callback_may_submit_and_cancel_and_stop_at_any_event(method: str, event: str) -> None:
    class _Busy(Callback):
        submitted: list[Job] | None = None

        def act(self, *_: Any) -> None:
            evaluator = self.evaluator
            assert isinstance(evaluator, Evaluator)
            if self.submitted is None:
                self.submitted = []
                self.submitted = evaluator.submit([{"x": 2}, {"x": 3}])
                self.submitted[1].cancel()
                evaluator.gather_other_jobs_done()

    callback = _Busy()
    setattr(callback, event, callback.act)
    with Evaluator.create(functions.echo, method, {"callbacks": [callback]}) as evaluator:
        in_background(evaluator.submit, [{"x": 1}]).result(BOUND)
        gathered = in_background(evaluator.gather, "ALL").result(BOUND)
        gathered += in_background(evaluator.gather, "ALL").result(BOUND)
        assert callback.submitted is not None
        assert len(gathered) == 3
        assert gathered[0].output == {"x": 1}


def test_callbacks_come_in_the_order_given_and_may_be_added() -> None:
    log: list[str] = []

    class _Named(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_done(self, job: Job) -> None:
            log.append(self.name)

    with Evaluator.create(echo, "thread", {"callbacks": (_Named(name) for name in "ab")}) as evaluator:
        evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        evaluator.add_callback(_Named("c"))
        evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        with pytest.raises(TypeError, match="callback"):
            evaluator.add_callback(print)  # type: ignore[arg-type]
    assert log == ["a", "b", "a", "b", "c"]


def test_a_callback_that_stops_the_search_on_serial_runs_nothing_more() -> None:
    class _Stops(Callback):
        def on_done(self, job: Job) -> None:
            if job.output == 2 and self.evaluator is not None:
                self.evaluator.stop("good enough")

    with Evaluator.create(echo, "serial", {"callbacks": [_Stops()]}) as evaluator:
        evaluator.submit([{"x": x} for x in range(10)])
        jobs = evaluator.gather("ALL")
        assert [job.state for job in jobs] == [JobState.DONE] * 3 + [JobState.CANCELLED] * 7
        assert jobs[5].status.stop_message == "good enough"


# -- races ------------------------------------------------------------------------------------------------------------


class _SlowDoor(ThreadBackend):
    """Takes its time to take tasks in, so that others come in between."""

    def __init__(self) -> None:
        super().__init__(1)
        self.entered, self.door = threading.Event(), threading.Event()

    def dispatch(self, tasks: Any) -> None:
        self.entered.set()
        self.door.wait(BOUND)
        super().dispatch(tasks)


def test_a_cancel_while_the_job_is_on_its_way_to_the_backend(files: Files) -> None:
    backend = _SlowDoor()
    with Evaluator(hold, backend) as evaluator:
        submitting = in_background(evaluator.submit, [{"started": files["ran"]}])
        assert backend.entered.wait(BOUND)
        (job,) = evaluator._scheduler._out.values()
        job.cancel()
        backend.door.set()
        submitting.result(BOUND)
        assert in_background(evaluator.gather, "ALL").result(BOUND) == [job]
        assert job.state is JobState.CANCELLED
        assert not files.exists("ran")


@pytest.mark.parametrize("method", ["thread", "process"])
def test_an_abandoned_or_killed_job_ends_though_warnings_are_errors(method: str, files: Files, recwarn: Any) -> None:
    with Evaluator.create(hold, method, {"num_workers": 2, "job_timeout": 0.2, "grace": 0.1}) as evaluator:
        (job,) = evaluator.submit([files.holder("a")])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert job.is_failed


@pytest.mark.parametrize("kind", ["exit", "reduce", "attribute"])
def test_parameters_that_misbehave_when_pickled_fail_their_job_alone(kind: str) -> None:
    with Evaluator.create(echo, "process") as evaluator:
        jobs = evaluator.submit([{"x": 1}, {"x": _Misbehaving(kind)}, {"x": 2}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.state for job in jobs] == [JobState.DONE, JobState.FAILED, JobState.DONE]


class _BadStr(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class _Misbehaving:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        if self.kind == "exit":
            raise SystemExit(4)
        if self.kind == "reduce":
            raise _BadStr
        raise RuntimeError("no")

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__" and object.__getattribute__(self, "kind") == "attribute":
            raise RuntimeError("no dict for you")
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
def test_a_task_of_a_coroutine_function_that_exits_hangs_nobody(method: str) -> None:
    with Evaluator.create(_exits_in_a_task, method) as evaluator:
        evaluator.submit([{}, {}])
        jobs = in_background(evaluator.gather, "ALL").result(BOUND)
        assert len(jobs) == 2
    gc.collect()  # asyncio logs the exception of a lost task when it is collected: here, not amid something else


async def _exits_in_a_task(job: RunningJob) -> str:
    async def leave() -> None:
        raise SystemExit(3)

    await asyncio.wait([asyncio.create_task(leave())])
    return "survived"


@pytest.mark.parametrize(
    ("given", "named"),
    [([1], "method_kwargs"), ({"callbacks": 3}, "callbacks"), ({"run_function_kwargs": [1]}, "run_function_kwargs")],
)
def test_an_argument_of_the_wrong_type_is_named(given: Any, named: str) -> None:
    with pytest.raises(TypeError, match=f"^{named} takes "):
        Evaluator.create(len, "serial", given)


def test_a_search_that_does_not_exist_names_those_that_do() -> None:
    storage = MemoryStorage()
    storage.create_search("spring")
    with pytest.raises(SearchNotFoundError, match=r"no search 'xyz' .*there are 'spring'"):
        Evaluator.create(len, "serial", {"storage": storage, "search_id": "xyz"})


class _SaysItsStartLate(Backend):
    """Tells of the progress before it tells of the start, as happens where they come from two threads."""

    def start(self, run_function, emit):
        self._emit = emit

    def dispatch(self, tasks):
        for task in tasks:
            self._emit([Progress(task.id, 0.5, "half way"), Recorded(task.id, {"step": 1})])

    def finish(self, job_id):
        self._emit([Started(job_id, time.time()), Done(job_id, 7)])

    def cancel(self, job_id, kill):
        pass

    def stop(self, grace):
        pass


def test_a_job_that_reports_runs_though_its_start_was_not_told_yet():
    with Evaluator(lambda job: None, backend := _SaysItsStartLate(1)) as evaluator:
        (job,) = evaluator.submit([{}])
        eventually(lambda: job.records, "what it recorded")
        assert (job.status.running, job.status.phase) == (True, "half way")
        backend.finish(job.id)
        assert evaluator.gather("ALL") == [job]
    assert (job.output, job.records) == (7, [{"step": 1}])


class _Told(Backend):
    """Runs nothing, and tells what it is told to tell."""

    capacity = 2

    def start(self, run_function, emit):
        self.tell_of = emit
        self.ids = []

    def dispatch(self, tasks):
        self.ids += [task.id for task in tasks]

    def cancel(self, job_id, kill):
        pass

    def stop(self, grace):
        pass


def test_an_end_that_was_told_before_nonsense_counts():
    storage = MemoryStorage()
    called: list[Job] = []
    with Evaluator(lambda job: None, backend := _Told(1), storage=storage) as evaluator:
        first, second = evaluator.submit([{}, {}])
        first.when_complete(called.append)
        with pytest.raises(KeyError):
            backend.tell_of([Done(first.id, 7), SimpleNamespace(job_id=second.id)])
        assert called == [first]
        assert evaluator.gather("BATCH", 1) == [first]
        assert (first.output, storage.load_jobs(evaluator.search_id)[0].output) == (7, 7)
        backend.tell_of([Done(second.id, 8)])
        assert evaluator.gather("ALL") == [second]


def test_the_end_of_a_cancelled_job_takes_nothing_from_those_told_with_it():
    seen: list[tuple[str, str]] = []

    class Seeing(Callback):
        def on_progress(self, job: Job) -> None:
            seen.append(("progress", job.id))

        def on_done(self, job: Job) -> None:
            seen.append(("done", job.id))

    with Evaluator(lambda job: None, backend := _Told(2), callbacks=[Seeing()]) as evaluator:
        first, second = evaluator.submit([{}, {}])
        first.cancel()
        backend.tell_of([Cancelled(first.id), Done(second.id, 7)])
        assert evaluator.gather("ALL") == [first, second]
    assert ("progress", second.id) in seen
    assert [one for one in seen if one[0] == "done"] == [("done", first.id), ("done", second.id)]


def test_a_cancelled_job_and_one_told_with_it_give_their_units_back():
    with Evaluator(lambda job: None, backend := _Told(2), resources={"gpu": ["0", "1"]}) as evaluator:
        first, second = evaluator.submit([{}, {}])
        first.cancel()
        backend.tell_of([Cancelled(first.id), Done(second.id, 7)])
        evaluator.gather("ALL")
        jobs = evaluator.submit([{}, {}])
        assert backend.ids[2:] == [job.id for job in jobs]
        backend.tell_of([Done(job.id, 8) for job in jobs])
        assert evaluator.gather("ALL") == jobs


def test_a_callback_is_not_called_by_the_thread_that_adds_another(caplog: pytest.LogCaptureFixture):
    threads: list[int] = []

    def fail(job: Job) -> None:
        threads.append(threading.get_ident())
        raise ValueError("a bug of its own")

    with Evaluator(lambda job: None, backend := _Told(1)) as evaluator:
        first, second = evaluator.submit([{}, {}])
        first.when_complete(fail)

        def events() -> Iterator[Any]:
            yield Done(first.id, 7)
            in_background(first.when_complete, lambda _: None).result(BOUND)
            yield Done(second.id, 7)

        backend.tell_of(events())
        evaluator.gather("ALL")
    assert threads == [threading.get_ident()]
    assert "a callback of job" in caplog.text


@pytest.mark.parametrize("method", ["thread", "process"])
def test_a_stop_that_lets_what_runs_come_to_its_end(method: str, files: Files) -> None:
    with Evaluator.create(hold, method, {"num_workers": 1, "retries": RetryPolicy(exception=1)}) as evaluator:
        running, waiting = evaluator.submit([files.holder("a", x=1), files.holder("b", x=2)])
        files.wait_started("a")
        eventually(lambda: running.state is JobState.RUNNING, "the job to run")
        evaluator.stop("walltime", running=False)
        with pytest.raises(SearchStoppedError, match="walltime"):
            evaluator.submit([{}])
        files.release("a")
        assert evaluator.gather("ALL") == [running, waiting]
        assert (running.state, running.output, waiting.state) == (JobState.DONE, 1, JobState.CANCELLED)
        assert evaluator.stop_reason == "walltime"


def test_a_stop_may_let_what_runs_go_on_and_then_not(files: Files) -> None:
    with Evaluator.create(hold, "process", {"num_workers": 1, "grace": 0.1}) as evaluator:
        (job,) = evaluator.submit([files.holder("a")])
        files.wait_started("a")
        evaluator.stop("near", running=False)
        evaluator.stop("now")
        assert evaluator.gather("ALL") == [job]
        assert (job.state, evaluator.stop_reason) == (JobState.CANCELLED, "near")


LARGE_PARENT = """
import subprocess, sys
ballast = bytearray(300 * 2**20)
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
"""

PEAK = """
import time
from evalkit import Evaluator

with Evaluator.create(lambda job: time.sleep(0.01), "serial") as evaluator:
    evaluator.submit([{}])
    print(evaluator.gather("ALL")[0].metadata["peak_rss"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_the_memory_of_a_job_is_not_that_of_who_started_the_program() -> None:
    command = [sys.executable, "-c", LARGE_PARENT, "-c", PEAK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert 2**20 < int(done.stdout) < 250 * 2**20


@pytest.mark.parametrize("ends", ["the maximum", "a stop"])
def test_a_list_is_submitted_as_a_whole_whatever_happens_meanwhile(ends: str) -> None:
    class Meddler(Callback):
        refused = False

        def on_launch(self, job: Job) -> None:
            if ends == "a stop":
                self.evaluator.stop("enough")
            elif not self.refused:
                with pytest.raises(MaximumJobsSpawnReached):
                    self.evaluator.submit([{"x": -1}])
                self.refused = True

    with Evaluator.create(lambda job: job["x"], "serial", {"callbacks": [Meddler()]}) as evaluator:
        evaluator.set_maximum_num_jobs_submitted(1000)
        jobs = evaluator.submit([{"x": x} for x in range(1000)])
        assert (len(jobs), evaluator.num_jobs_submitted) == (1000, 1000)
        assert evaluator.gather("ALL") == jobs
        states = {job.state for job in jobs}
        assert states == ({JobState.CANCELLED} if ends == "a stop" else {JobState.DONE})
