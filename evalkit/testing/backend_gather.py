"""The conformance suite of backends: what comes back, in which order, how often, and to whom."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from evalkit import Callback, Evaluator, Job, JobState
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, Files, eventually, gathering, in_background

__all__ = ["BackendCallbacks", "BackendGather", "BackendSurroundings"]

Make = Callable[..., Evaluator]


class BackendGather(BackendFixtures):
    """``ALL`` and ``BATCH``: every job exactly once, as the object that submit returned."""

    def test_all_comes_in_order_of_submission(self, make: Make) -> None:
        evaluator = make(functions.echo, num_workers=2)
        jobs = [*evaluator.submit([{"x": i} for i in range(5)]), *evaluator.submit({"x": i} for i in range(5, 9))]
        gathered = evaluator.gather("ALL")
        assert [id(job) for job in gathered] == [id(job) for job in jobs]
        assert [job.output for job in gathered] == [{"x": i} for i in range(9)]
        assert {job.state for job in gathered} == {JobState.DONE}
        assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered == 9

    def test_nothing_out_is_an_empty_list(self, make: Make) -> None:
        evaluator = make(functions.echo)
        assert evaluator.gather("ALL") == []
        assert evaluator.gather("BATCH", 3) == []
        assert evaluator.submit([]) == []
        evaluator.submit([{"x": 1}])
        assert len(evaluator.gather("ALL")) == 1
        assert evaluator.gather("ALL") == []
        assert evaluator.gather("BATCH") == []

    def test_batches_are_at_least_their_size_and_bring_each_job_once(self, make: Make) -> None:
        evaluator = make(functions.echo, num_workers=2)
        jobs = evaluator.submit([{"x": i} for i in range(12)])
        seen: list[Job] = []
        while len(seen) < 12:
            size = min(3, 12 - len(seen))
            batch = evaluator.gather("BATCH", size)
            assert len(batch) >= size
            seen += batch
        assert sorted(map(id, seen)) == sorted(map(id, jobs))

    def test_a_batch_brings_what_ended_first(self, make: Make, files: Files) -> None:
        self.need(not self.inline, "jobs side by side")
        evaluator = make(functions.hold, num_workers=2)
        slow, fast = evaluator.submit([files.holder("slow"), {"x": 1}])
        assert in_background(evaluator.gather, "BATCH", 1).result(BOUND) == [fast]
        assert not slow.is_complete
        files.release("slow")
        assert in_background(evaluator.gather, "BATCH", 1).result(BOUND) == [slow]

    def test_a_batch_is_in_the_order_of_the_ends(self, make: Make, files: Files) -> None:
        self.need(not self.inline, "jobs side by side")
        evaluator = make(functions.hold, num_workers=2)
        first, second = evaluator.submit([files.holder("first"), files.holder("second")])
        for name, job in (("second", second), ("first", first)):
            files.wait_started(name)
            files.release(name)
            eventually(functools.partial(_is_complete, job), f"the end of the {name} job")
        assert evaluator.gather("BATCH", 2) == [second, first]

    def test_a_batch_too_large_is_clamped_with_one_warning(self, make: Make) -> None:
        evaluator = make(functions.echo)
        evaluator.submit([{"x": 1}, {"x": 2}])
        with pytest.warns(UserWarning, match="2") as caught:
            assert len(evaluator.gather("BATCH", 5)) == 2
        assert len(caught) == 1
        assert caught[0].filename == __file__, "it points to the line that gathers"

    def test_ten_thousand_tiny_jobs(self, make: Make) -> None:
        evaluator = make(functions.echo, num_workers=2)
        jobs = evaluator.submit({"x": i} for i in range(self.tiny_jobs))
        gathered = in_background(evaluator.gather, "ALL").result(2 * BOUND)
        assert len({job.id for job in jobs}) == self.tiny_jobs
        assert [id(job) for job in gathered] == [id(job) for job in jobs]
        assert all(job.output == {"x": i} for i, job in enumerate(gathered))

    def test_a_loop_of_batches(self, make: Make) -> None:
        evaluator = make(functions.echo, num_workers=2)
        evaluator.submit([{"x": 0}, {"x": 1}])
        gathered = 0
        while gathered < 300:
            batch = evaluator.gather("BATCH", 1)
            assert batch
            gathered += len(batch)
            evaluator.submit([{"x": gathered} for _ in batch])
        evaluator.gather("ALL")
        assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered

    def test_a_lazy_iterable_runs_while_it_still_produces(self, make: Make, files: Files) -> None:
        self.need(not self.inline, "jobs that run before they are gathered")
        evaluator = make(functions.hold)
        drawn = 0

        def produce() -> Iterator[dict[str, Any]]:
            nonlocal drawn
            deadline = time.monotonic() + BOUND
            while not (drawn and files.exists("first.started")):
                assert time.monotonic() < deadline, "the first job did not start while others were produced"
                yield {"started": files["first.started"]} if drawn == 0 else {"x": drawn}
                drawn += 1
                time.sleep(0.01)

        assert len(evaluator.submit(produce())) == drawn == len(evaluator.gather("ALL"))

    def test_any_mapping_and_any_iterable_will_do(self, make: Make) -> None:
        evaluator = make(functions.reveal)
        odd = {"self": 1, "job": 2, "id": 3, "not an identifier!": 4, "": 5}
        jobs = evaluator.submit((MappingProxyType({"x": 1}), odd, {}))
        evaluator.gather("ALL")
        assert [job.output["keys"] for job in jobs] == [["x"], sorted(odd), []]
        assert [job.output["id"] for job in jobs] == [job.id for job in jobs]

    def test_as_many_run_at_once_as_there_are_workers(self, make: Make, tmp_path: Path) -> None:
        self.need(not self.inline, "jobs side by side")
        evaluator = make(functions.admit, num_workers=3)
        evaluator.submit([{"room": str(tmp_path), "expected": 3}] * 3)
        assert [job.output for job in in_background(evaluator.gather, "ALL").result(BOUND)] == ["met"] * 3


def _is_complete(job: Job) -> bool:
    return job.is_complete


class BackendCallbacks(BackendFixtures):
    """Callbacks see every job, in order, whatever the backend emits from which thread."""

    def test_each_job_is_launched_done_and_gathered_once_in_this_order(self, make: Make) -> None:
        log = _Log()
        evaluator = make(functions.throw_odd, num_workers=2, callbacks=[log])
        jobs = evaluator.submit([{"x": i} for i in range(40)])
        seen: list[Job] = []
        while len(seen) < 40:
            seen += evaluator.gather("BATCH", 1)
            assert {job.id for job in seen} == log.ids("on_gather"), "gather returns after its callbacks"
        evaluator.close()
        for job in jobs:
            events = [name for name, job_id in log.events if job_id == job.id and name != "on_progress"]
            assert events == ["on_launch", "on_done", "on_gather"]
            assert log.events.index(("on_progress", job.id)) < log.events.index(("on_done", job.id)), "it started first"
        assert log.live == [], "a job is in its final state before on_done"
        assert log.events[-1] == ("on_close", "")

    def test_a_callback_that_raises_breaks_nothing(self, make: Make) -> None:
        log = _Log()
        evaluator = make(functions.echo, callbacks=[_Raising(), log])
        evaluator.submit([{"x": 1}, {"x": 2}])
        assert [job.state for job in evaluator.gather("ALL")] == [JobState.DONE] * 2
        assert len(log.ids("on_done")) == 2

    def test_a_callback_may_submit(self, make: Make) -> None:
        evaluator = make(functions.echo, callbacks=[_Chain(5)])
        evaluator.submit([{"x": 0}])
        outputs: list[Any] = []
        while len(outputs) < 6:
            batch = in_background(evaluator.gather, "BATCH").result(BOUND)
            assert batch
            outputs += [job.output["x"] for job in batch]
        assert outputs == [0, 1, 2, 3, 4, 5]


class BackendSurroundings(BackendFixtures):
    """From whatever thread or loop it is used, and with others beside it."""

    def test_submit_from_several_threads(self, make: Make) -> None:
        evaluator = make(functions.echo, num_workers=2)
        with ThreadPoolExecutor(4) as threads:
            parts = list(threads.map(lambda i: evaluator.submit([{"t": i, "x": x} for x in range(50)]), range(4)))
        jobs = [job for part in parts for job in part]
        gathered = in_background(evaluator.gather, "ALL").result(BOUND)
        assert len({job.id for job in jobs}) == 200
        assert sorted(map(id, gathered)) == sorted(map(id, jobs))
        assert all(job.output == job.args for job in gathered)
        for part in parts:
            assert [job.number for job in part] == sorted(job.number for job in part)

    def test_gather_from_several_threads_brings_each_job_once(self, make: Make) -> None:
        evaluator = make(functions.echo, num_workers=2)
        jobs = evaluator.submit([{"x": i} for i in range(60)])

        def draw() -> list[Job]:
            mine: list[Job] = []
            while batch := evaluator.gather("BATCH", 1):
                mine += batch
            return mine

        draws = [in_background(draw) for _ in range(3)]
        gathered = [job for future in draws for job in future.result(BOUND)]
        gathered += evaluator.gather("ALL")
        assert sorted(map(id, gathered)) == sorted(map(id, jobs))

    def test_a_whole_life_in_another_thread(self) -> None:
        def live() -> list[Any]:
            with self.create(functions.echo, num_workers=2) as evaluator:
                evaluator.submit([{"x": 1}, {"x": 2}])
                return [job.output for job in evaluator.gather("ALL")]

        assert in_background(live).result(BOUND) == [{"x": 1}, {"x": 2}]

    def test_two_evaluators_at_once(self, make: Make) -> None:
        first, second = make(functions.echo), make(functions.reveal)
        for x in range(5):
            first.submit([{"x": x}])
            second.submit([{"y": x}])
        assert [job.output for job in first.gather("ALL")] == [{"x": x} for x in range(5)]
        first.close()
        second.submit([{"y": 5}])
        assert [job.output["keys"] for job in second.gather("ALL")] == [["y"]] * 6

    def test_within_a_running_event_loop(self, make: Make) -> None:
        async def main() -> list[Any]:
            evaluator = make(functions.echo)
            evaluator.submit([{"x": 1}])
            outputs = [job.output for job in evaluator.gather("ALL")]
            done = await evaluator.execute({"x": 2})
            (waiting,) = evaluator.submit([{"x": 3}])
            assert await evaluator.execute(waiting) is waiting
            many = await asyncio.gather(*(evaluator.execute({"x": x}) for x in range(4, 40)))
            assert evaluator.gather("ALL") == [], "execute gathers"
            evaluator.close()
            return [*outputs, done.output, waiting.output, *(job.output for job in many)]

        assert asyncio.run(asyncio.wait_for(main(), BOUND)) == [{"x": x} for x in range(1, 40)]

    def test_execute_does_not_block_the_loop(self, make: Make, files: Files) -> None:
        async def main() -> str:
            evaluator = make(functions.hold)
            waiting = asyncio.create_task(evaluator.execute(files.holder("a")))
            while not files.exists("a.started"):
                await asyncio.sleep(0.01)
            files.release("a")
            return (await waiting).state

        assert asyncio.run(asyncio.wait_for(main(), BOUND)) is JobState.DONE

    def test_coroutine_functions(self, make: Make) -> None:
        evaluator = make(functions.slow_square, num_workers=2)
        evaluator.submit([{"x": x} for x in range(6)])
        assert [job.output for job in in_background(evaluator.gather, "ALL").result(BOUND)] == [0, 1, 4, 9, 16, 25]

    def test_a_job_can_be_waited_for_alone(self, make: Make, files: Files) -> None:
        evaluator = make(functions.hold)
        held, other = evaluator.submit([files.holder("a", x=1), {"x": 2}])
        if not self.inline:
            with pytest.raises(TimeoutError):
                held.result(timeout=0.01)
        with gathering(evaluator):
            files.wait_started("a")
            files.release("a")
            assert held.result(timeout=BOUND) == 1
            assert other.result(timeout=BOUND) == 2


class _Log(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.live: list[str] = []

    def ids(self, event: str) -> set[str]:
        return {job_id for name, job_id in self.events if name == event}

    def on_launch(self, job: Job) -> None:
        self.events.append(("on_launch", job.id))

    def on_progress(self, job: Job) -> None:
        self.events.append(("on_progress", job.id))

    def on_done(self, job: Job) -> None:
        self.events.append(("on_done", job.id))
        if not job.is_complete:
            self.live.append(job.id)

    def on_gather(self, jobs: Sequence[Job]) -> None:
        self.events += [("on_gather", job.id) for job in jobs]

    def on_close(self) -> None:
        self.events.append(("on_close", ""))


class _Raising(Callback):
    def on_launch(self, job: Job) -> None:
        raise ValueError(f"on_launch of {job.id}")

    def on_done(self, job: Job) -> None:
        raise ValueError(f"on_done of {job.id}")

    def on_gather(self, jobs: Sequence[Job]) -> None:
        raise ValueError(f"on_gather of {len(jobs)} jobs")


class _Chain(Callback):
    """Submits the next job when one is done."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_done(self, job: Job) -> None:
        if isinstance(self.evaluator, Evaluator) and job.args["x"] < self.last:
            self.evaluator.submit([{"x": job.args["x"] + 1}])
