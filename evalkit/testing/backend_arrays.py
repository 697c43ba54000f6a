"""The conformance suite of backends: run functions that hold large arrays."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalkit import Evaluator
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, in_background

__all__ = ["BackendArrays"]

_LENGTH = 2**17  # numbers, of 8 bytes each


class BackendArrays(BackendFixtures):
    """What a run function holds travels with it, however large it is."""

    @pytest.mark.parametrize("where", ["globals", "closure", "self", "run_function_kwargs", "worker_init"])
    def test_run_functions_that_hold_an_array(self, make: Callable[..., Evaluator], where: str) -> None:
        self.need(self.can.by_value, "functions by value")
        self.need(where != "worker_init" or self.traits.takes_worker_init, "worker_init")
        numpy = pytest.importorskip("numpy")
        self._check(make, where, numpy.ones(_LENGTH))

    @pytest.mark.parametrize("where", ["closure", "run_function_kwargs"])
    @pytest.mark.parametrize("library", ["pandas", "torch"])
    def test_run_functions_that_hold_what_libraries_make(
        self, make: Callable[..., Evaluator], where: str, library: str
    ) -> None:
        self.need(self.can.by_value, "functions by value")
        module = pytest.importorskip(library)
        data = module.DataFrame({"a": [1.0] * _LENGTH})["a"] if library == "pandas" else module.ones(_LENGTH)
        self._check(make, where, data)

    def test_a_worker_gets_the_array_as_it_was_when_the_evaluator_was_created(
        self, make: Callable[..., Evaluator]
    ) -> None:
        self.need(not self.can.same_memory, "memory of its own")
        numpy = pytest.importorskip("numpy")
        data = numpy.ones(_LENGTH)
        evaluator = make(_total, run_function_kwargs={"data": data})
        data[:] = 2.0
        (job,) = evaluator.submit([{"x": 0}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.error, job.output) == (None, _LENGTH)

    def test_it_travels_to_each_worker_once(self, make: Callable[..., Evaluator], tmp_path: Path) -> None:
        self.need(not self.can.same_memory, "memory of its own")
        log = tmp_path / "rebuilt"
        evaluator = make(_total, num_workers=2, run_function_kwargs={"data": _Logged(str(log))})
        for _ in range(3):
            jobs = evaluator.submit([{"x": x} for x in range(20)])
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert [job.error for job in jobs] == [None] * len(jobs)
        pids = log.read_text().split()
        assert len(pids) == len(set(pids))

    def _check(self, make: Callable[..., Evaluator], where: str, data: Any) -> None:
        function, options = _holding(where, data)
        evaluator = make(function, num_workers=2, **options)
        jobs = evaluator.submit([{"x": x} for x in range(4)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.error for job in jobs] == [None] * len(jobs)
        assert [job.output for job in jobs] == [_LENGTH + x for x in range(len(jobs))]


def _holding(where: str, data: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A run function that adds up ``data`` and the parameter ``x``, and the options that it needs."""
    if where == "globals":
        namespace: dict[str, Any] = {"__name__": "__main__", "DATA": data}
        exec("def run(job): return float(DATA.sum()) + job['x']", namespace)  # noqa: S102 - as a script has it
        return namespace["run"], {}
    if where == "closure":
        return lambda job: float(data.sum()) + job["x"], {}
    if where == "self":
        return _Model(data).run, {}
    if where == "run_function_kwargs":
        return _total, {"run_function_kwargs": {"data": data}}
    return _state_total, {"worker_init": lambda: data}


class _Model:
    def __init__(self, data: Any) -> None:
        self._data = data

    def run(self, job: Any) -> float:
        return _total(job, self._data)


class _Logged:
    """Writes down where it was rebuilt."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._data = bytes(2**20)

    def sum(self) -> float:
        return float(len(self._data))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with open(self._log, "a") as file:
            file.write(f"{os.getpid()}\n")


def _total(job: Any, data: Any) -> float:
    return float(data.sum()) + float(job["x"])


def _state_total(job: Any) -> float:
    return _total(job, job.worker_state)
