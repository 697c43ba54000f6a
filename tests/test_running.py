"""RunningJob: a mapping of the parameters, and the channel back."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest

from evalkit import RunningJob, call_with_kwargs
from evalkit.running import is_coroutine_function, own_copy
from evalkit.testing import functions


class _Channel:
    """Keeps what a job says."""

    def __init__(self, stop: bool = False) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.stop = stop

    def progress(self, job_id: str, progress: float, phase: str) -> None:
        self.said.append((job_id, progress, phase))

    def record(self, job_id: str, values: dict[str, Any]) -> None:
        self.said.append((job_id, values))

    def stop_requested(self, job_id: str) -> bool:
        return self.stop


def running(stop: bool = False, **parameters: Any) -> tuple[RunningJob, _Channel]:
    channel = _Channel(stop)
    return RunningJob(parameters, "s.1", 2, channel), channel


def test_it_is_a_mapping_of_the_parameters() -> None:
    job, _ = running(x=1, y=None)
    assert isinstance(job, Mapping)
    assert dict(job) == {"x": 1, "y": None} == job.parameters
    assert (job["x"], job.get("z", 3), len(job), "y" in job, list(job)) == (1, 3, 2, True, ["x", "y"])
    with pytest.raises(KeyError):
        job["z"]
    assert {**job} == {"x": 1, "y": None}
    assert (job.id, job.attempt, job.worker_state, job.resources) == ("s.1", 2, None, {})
    assert repr(job) == "RunningJob('s.1', attempt=2, {'x': 1, 'y': None})"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (0.5, 0.5),
        (0, 0.0),
        (1, 1.0),
        (-3, 0.0),
        (7.5, 1.0),
        (math.inf, 1.0),
        (-math.inf, 0.0),
        pytest.param(10**400, 1.0, id="huge"),
    ],
)
def test_progress_is_moved_between_0_and_1(given: float, sent: float) -> None:
    job, channel = running()
    assert job.report(given, "here") is False
    assert channel.said == [("s.1", sent, "here")]
    assert isinstance(channel.said[0][1], float)


def test_progress_that_is_no_number() -> None:
    job, channel = running()
    with pytest.raises(ValueError, match="NaN"):
        job.report(math.nan)
    for wrong in ("0.5", None, [0.5]):
        with pytest.raises(TypeError):
            job.report(wrong)  # type: ignore[arg-type]
    assert channel.said == []


def test_a_request_to_stop_is_heard_in_two_ways() -> None:
    job, _ = running(stop=True)
    assert job.stopped() is True
    assert job.report(0.5) is True


def test_records() -> None:
    job, channel = running()
    job.record(step=1, objective=0.5)
    assert channel.said == [("s.1", {"step": 1, "objective": 0.5})]


def test_call_with_kwargs() -> None:
    wrapped = call_with_kwargs(functions.add)
    job, _ = running(x=1)
    assert wrapped(job) == 11
    assert wrapped(job, y=2) == 3
    assert pickle.loads(pickle.dumps(wrapped))(job) == 11
    assert "add" in repr(wrapped)
    with pytest.raises(TypeError, match="callable"):
        call_with_kwargs(3)  # type: ignore[arg-type]
    job, _ = running(w=1)
    with pytest.raises(TypeError, match="w"):
        wrapped(job)


async def _coroutine(job: RunningJob) -> int:
    return 1


class _AsyncCallable:
    async def __call__(self, job: RunningJob) -> int:
        return 1

    async def method(self, job: RunningJob) -> int:
        return 1


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (_coroutine, True),
        (functools.partial(_coroutine), True),
        (functools.partial(functools.partial(_coroutine)), True),
        (call_with_kwargs(_coroutine), True),
        (functools.partial(call_with_kwargs(_coroutine), x=1), True),
        (call_with_kwargs(functools.partial(_coroutine)), True),
        (_AsyncCallable(), True),
        (_AsyncCallable().method, True),
        (functions.Coroutine(functions.echo), True),
        (functions.echo, False),
        (functions.Plain(functions.hold), False),
        (functools.partial(functions.echo), False),
        (call_with_kwargs(functions.add), False),
        (lambda job: 1, False),
        (print, False),
    ],
)
def test_which_functions_are_coroutine_functions(function: Any, answer: bool) -> None:
    assert is_coroutine_function(function) is answer


def test_a_copy_of_parameters_shares_no_container() -> None:
    inner = [1, {"a": {2}}]
    given = {"x": 1, "list": inner, "tuple": (inner, 3), "dict": {"deep": [[inner]]}, "flat": [1, 2.0, None]}
    copy = own_copy(given)
    assert copy == given
    inner[1]["a"].add(4)  # type: ignore[index]
    inner.append(5)
    given["flat"].append(6)  # type: ignore[attr-defined]
    assert copy["list"] == [1, {"a": {2}}] == copy["tuple"][0] == copy["dict"]["deep"][0][0]
    assert copy["list"] is copy["tuple"][0], "what was one is one"
    assert copy["flat"] == [1, 2.0, None]


def test_a_copy_of_parameters_leaves_other_objects_alone() -> None:
    class _Config(dict[str, Any]):
        pass

    config, thing = _Config(a=[1]), object()
    copy = own_copy({"config": config, "things": [thing]})
    assert copy["config"] is config
    assert copy["things"][0] is thing


def test_a_copy_of_parameters_without_an_end() -> None:
    loop: list[Any] = [1]
    loop.append((loop, {"loop": loop}))
    copy = own_copy({"loop": loop})["loop"]
    assert copy is not loop
    assert copy[1][0] is copy
    assert copy[1][1]["loop"] is copy
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert own_copy({"deep": deep})["deep"] is deep, "deeper than can be followed: shared"
