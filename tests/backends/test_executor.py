"""ExecutorBackend: jobs that share calls, what is told while a call runs, and what is left of a call that broke."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from evalkit import ErrorInfo, Evaluator, Job, JobCause, JobState
from evalkit.backends import Capabilities, ExecutorBackend, Fault, Reach
from evalkit.backends.batching import ChunkSizer
from evalkit.backends.chunk_wire import Ends, Kind, unpack_message
from evalkit.backends.side_channel import Receive, SideChannel
from evalkit.backends.socket_channel import SocketChannel
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, gathering, in_background


class Counting(Executor):
    """Counts the calls that it passes on."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.calls = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        return self.executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.executor.shutdown(wait, cancel_futures=cancel_futures)


class Threads(ExecutorBackend):
    capabilities = Capabilities(same_memory=True, by_value=True, streams=True)

    def make_executor(self) -> Executor:
        self.counting = Counting(ThreadPoolExecutor(self.num_workers))
        return self.counting


class Processes(ExecutorBackend):
    capabilities = Capabilities(isolates_crashes=True, by_value=True, streams=True)

    def make_executor(self) -> Executor:
        self.counting = Counting(ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn")))
        return self.counting


def note(job: Any) -> Any:
    """Write down that it ran, then do what ``then`` says."""
    if "ran" in job:
        with open(job["ran"], "a") as file:
            file.write(f"{job['x']}\n")
    if job.get("then") == "die":
        # Not before the others of its call were told of: a job that takes this long is alone by then.
        time.sleep(0.5)
        os._exit(7)
    if job.get("then") == "hold":
        return functions.Plain(functions.hold)(job)
    return job["x"]


def warm(evaluator: Evaluator, backend: ExecutorBackend) -> None:
    """Until cheap jobs share calls: how many do depends on how fast this machine is just now."""
    deadline = time.monotonic() + BOUND
    while backend.capacity < 2 * backend.num_workers * 16:
        assert time.monotonic() < deadline, "cheap jobs do not come to share calls"
        evaluator.submit([{"x": x} for x in range(200)])
        in_background(evaluator.gather, "ALL").result(BOUND)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_cheap_jobs_come_to_share_calls() -> None:
    backend = Processes(2)
    with Evaluator(note, backend) as evaluator:
        warm(evaluator, backend)
        before = backend.counting.calls
        jobs = evaluator.submit([{"x": x} for x in range(2000)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert backend.counting.calls - before < 500
    assert [job.output for job in jobs] == list(range(2000))


@pytest.mark.parametrize("how", ["batching=False", "job_timeout"])
def test_each_job_travels_alone(how: str) -> None:
    backend = Processes(2, batching=how != "batching=False")
    with Evaluator(note, backend, job_timeout=BOUND if how == "job_timeout" else None) as evaluator:
        evaluator.submit([{"x": x} for x in range(300)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert backend.counting.calls == 300


def test_a_backend_without_a_side_channel_sends_each_alone_and_says_all_with_the_result() -> None:
    class Mute(Processes):
        capabilities = Capabilities(isolates_crashes=True, by_value=True)

        def make_channel(self) -> None:
            return None

    backend = Mute(2)
    with Evaluator(functions.fail_with_records, backend) as evaluator:
        jobs = evaluator.submit([{"how": "raise"}] * 20)
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert backend.counting.calls == 20
    assert {job.cause for job in jobs} == {JobCause.EXCEPTION}
    assert all(job.records == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.5}] for job in jobs)


class Leaky(SocketChannel):
    """Loses the first message that tells of an end."""

    lost = False

    def start(self, receive: Receive) -> None:
        def receive_most(data: bytes) -> None:
            sayings = unpack_message(data).sayings
            ends = isinstance(sayings, Ends) or any(saying[0] == Kind.DONE for saying in sayings)
            if ends and not self.lost:
                self.lost = True
            else:
                receive(data)

        super().start(receive_most)


def test_jobs_whose_ends_were_lost_on_the_way_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(Processes):
        def make_channel(self) -> SideChannel:
            self.leaky = Leaky()
            return self.leaky

    monkeypatch.setattr("evalkit.backends.executor._LATE", 0.2)
    backend = Lossy(2, hold=0.001)
    with Evaluator(note, backend) as evaluator:
        deadline = time.monotonic() + BOUND
        while not backend.leaky.lost:
            assert time.monotonic() < deadline, "nothing was told over the channel"
            jobs = evaluator.submit([{"x": x} for x in range(2000)])
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert [job.output for job in jobs] == list(range(2000))


def test_results_that_overtake_what_was_said_before_take_no_thread_each() -> None:
    class Slow(SocketChannel):
        def start(self, receive: Receive) -> None:
            def receive_late(data: bytes) -> None:
                time.sleep(0.01)
                receive(data)

            super().start(receive_late)

    class Overtaken(Processes):
        def make_channel(self) -> SideChannel:
            return Slow()

    backend = Overtaken(2, hold=0.001)
    with Evaluator(note, backend) as evaluator:
        warm(evaluator, backend)
        before = threading.active_count()
        for _ in range(5):
            jobs = evaluator.submit([{"x": x} for x in range(2000)])
            in_background(evaluator.gather, "ALL").result(BOUND)
            assert [job.output for job in jobs] == list(range(2000))
        assert threading.active_count() <= before + 2  # in_background, and the one that looks after them


def test_jobs_that_carry_much_do_not_share_calls() -> None:
    backend = Processes(1)
    with Evaluator(len, backend) as evaluator:
        warm(evaluator, backend)
        before = backend.counting.calls
        evaluator.submit([{"data": bytes(2**21)}] * 8)
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert backend.counting.calls - before == 8


def test_sizes_follow_what_was_measured() -> None:
    sizer = ChunkSizer(True)
    assert sizer.share(100, 2, False) == 1, "nothing is known yet"
    for _ in range(10):
        sizer.note(sizer.size, sizer.size * 5e-6, sizer.size * 5e-6 + 3e-4)
    assert sizer.size == pytest.approx(3e-4 / 0.05 / 5e-6, abs=2) or sizer.size == 512
    assert sizer.share(400, 4, False) == 100, "the last are spread over the workers"
    assert sizer.share(10, 4, False) == 3
    assert sizer.share(10, 4, True) == 10, "but at the end not so few that the calls take longer than they do"
    assert sizer.share(100, 2, True) == 100, "nor are so few left for another call"
    assert sizer.share(300, 2, True) == 150
    sizer.note(sizer.size, 1.0 * sizer.size, 1.0 * sizer.size + 3e-4)
    assert sizer.size == 1, "slow jobs travel alone at once"
    off = ChunkSizer(False)
    off.note(1, 1e-6, 1e-3)
    assert off.size == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batching": "no"}, TypeError),
        ({"hold": 0}, ValueError),
        ({"hold": "soon"}, ValueError),
        ({"worker_init": 3}, TypeError),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Threads(1, **options)


# -- what is told while a call runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Threads, Processes])
def test_nobody_waits_for_a_slow_job_that_shares_its_call(make: type[Any], files: Files) -> None:
    backend = make(2)
    with Evaluator(note, backend) as evaluator:
        warm(evaluator, backend)
        slow = {"x": "slow", "then": "hold", **files.holder("slow")}
        jobs = evaluator.submit([*({"x": x} for x in range(30)), slow, *({"x": x} for x in range(30, 60))])
        with gathering(evaluator):
            files.wait_started("slow")
            others = [job for job in jobs if job.args["x"] != "slow"]
            for job in others:
                assert job.result(timeout=BOUND) == job.args["x"]
            (held,) = [job for job in jobs if job.args["x"] == "slow"]
            eventually(lambda: held.is_running, "the start of the slow job")
            assert not held.is_complete, "those before it were told of, those behind it ran elsewhere"
            files.release("slow")
    assert held.output == "slow"


def test_one_worker_tells_what_ended_before_a_slow_job(files: Files) -> None:
    backend = Processes(1)
    with Evaluator(note, backend) as evaluator:
        warm(evaluator, backend)
        ran = files["ran"]
        jobs = evaluator.submit(
            [
                *({"x": x} for x in range(8)),
                {"x": 8, "then": "hold", **files.holder("slow")},
                {"x": 9, "ran": ran},
            ]
        )
        with gathering(evaluator):
            files.wait_started("slow")
            assert [job.result(timeout=BOUND) for job in jobs[:8]] == list(range(8))
            eventually(lambda: jobs[8].is_running, "the start of the slow job")
            # It is in our hands again, or still: it can be kept from running.
            eventually(lambda: jobs[9].is_complete or bool(jobs[9].cancel()), "a cancel")
            eventually(lambda: jobs[9].is_complete, "the end of the job that was cancelled")
            files.release("slow")
        assert jobs[9].state is JobState.CANCELLED
        assert not files.exists("ran")


# -- what is left of a call that broke --------------------------------------------------------------------------------


def test_what_was_told_before_a_crash_does_not_run_again(files: Files) -> None:
    backend = Processes(1)
    with Evaluator(note, backend) as evaluator:
        warm(evaluator, backend)
        ran = files["ran"]
        jobs = evaluator.submit([{"x": x, "ran": ran, "then": "die" if x == 10 else None} for x in range(20)])
        in_background(evaluator.gather, "ALL").result(BOUND)
    assert [job.args["x"] for job in jobs if job.cause is JobCause.CRASH] == [10]
    assert [job.output for job in jobs if job.is_success] == [x for x in range(20) if x != 10]
    assert sorted(map(int, Path(ran).read_text().split())) == list(range(20)), "each once, the culprit too"


def test_of_cheap_jobs_in_a_broken_call_the_one_to_blame_fails() -> None:
    backend = Processes(2)
    with Evaluator(functions.die, backend) as evaluator:
        warm(evaluator, backend)
        jobs = evaluator.submit([{"x": x, "how": "exit" if x == 50 else None} for x in range(100)])
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.args["x"] for job in jobs if job.cause is JobCause.CRASH] == [50]
        assert [job.output for job in jobs if job.is_success] == [x for x in range(100) if x != 50]


class Flaky(Threads):
    """An engine whose calls fail as ``fault`` says, so often."""

    fault: Fault
    times: int

    def make_executor(self) -> Executor:
        backend = self

        class Failing(Counting):
            def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
                if backend.times:
                    backend.times -= 1
                    future: Future[Any] = Future()
                    future.set_exception(ValueError("the engine hiccups"))
                    return future
                return super().submit(fn, *args, **kwargs)

        self.counting = Failing(ThreadPoolExecutor(self.num_workers))
        return self.counting

    def blame(self, exc: BaseException) -> Fault:
        assert str(exc) == "the engine hiccups"
        return self.fault


def flaky(reach: Reach, cause: JobCause, times: int) -> Flaky:
    backend = Flaky(2)
    backend.fault = Fault(reach, cause, ErrorInfo("Hiccup", "it said"))
    backend.times = times
    return backend


@pytest.mark.parametrize("reach", list(Reach))
def test_a_loss_is_nobodys_fault(reach: Reach) -> None:
    with Evaluator(note, flaky(reach, JobCause.LOST, 3)) as evaluator:
        evaluator.submit([{"x": x} for x in range(10)])
        jobs = in_background(evaluator.gather, "ALL").result(BOUND)
    assert [job.output for job in jobs] == list(range(10))
    assert {job.attempt for job in jobs} == {0}, "it uses up no retry"


@pytest.mark.parametrize("cause", [JobCause.MEMORY, JobCause.CRASH, JobCause.EXCEPTION])
def test_a_fault_of_one_job_is_told_with_its_cause(cause: JobCause) -> None:
    with Evaluator(note, flaky(Reach.CALL, cause, 1)) as evaluator:
        (bad,) = evaluator.submit([{"x": 1}])
        in_background(evaluator.gather, "ALL").result(BOUND)
        (good,) = evaluator.submit([{"x": 2}])
        in_background(evaluator.gather, "ALL").result(BOUND)
    assert (bad.state, bad.cause, str(bad.error)) == (JobState.FAILED, cause, "Hiccup: it said")
    assert good.output == 2


def test_an_author_whose_blame_raises_loses_that_job_only(caplog: pytest.LogCaptureFixture) -> None:
    backend = flaky(Reach.CALL, JobCause.CRASH, 1)
    backend.blame = lambda exc: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with Evaluator(note, backend) as evaluator:
        evaluator.submit([{"x": 1}])
        (job,) = in_background(evaluator.gather, "ALL").result(BOUND)
        assert (job.cause, "hiccups" in str(job.error)) == (JobCause.LOST, True)
    assert "ZeroDivisionError" in caplog.text


def test_an_engine_that_cannot_start_again_fails_its_jobs() -> None:
    class Once(Processes):
        made = 0

        def make_executor(self) -> Executor:
            self.made += 1
            if self.made > 1:
                raise OSError("no more processes")
            return super().make_executor()

    with Evaluator(functions.die, Once(1)) as evaluator:
        evaluator.submit([{"x": 0, "how": "exit"}])
        evaluator.submit([{"x": 1}])
        first, second = in_background(evaluator.gather, "ALL").result(BOUND)
    assert first.cause is JobCause.CRASH
    assert (second.cause, "no more processes" in str(second.error)) == (JobCause.LOST, True)


# -- surroundings -----------------------------------------------------------------------------------------------------

#: How a program begins that has a backend of its own.
_POOL = """
import os, pathlib, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from evalkit import Evaluator
from evalkit.backends import Capabilities, ExecutorBackend

class Pool(ExecutorBackend):
    capabilities = Capabilities(isolates_crashes=True, by_value=True, streams=True)

    def make_executor(self):
        return ProcessPoolExecutor(self.num_workers, mp_context=get_context("spawn"))
"""


def test_a_program_that_ends_without_close_does_not_wait_for_its_jobs(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        _POOL
        + textwrap.dedent("""
            def run(job):
                pathlib.Path(job["started"]).touch()
                while not job.stopped():
                    time.sleep(0.01)

            if __name__ == "__main__":
                evaluator = Evaluator(run, Pool(1))
                evaluator.submit([{"started": sys.argv[1]}])
                while not pathlib.Path(sys.argv[1]).exists():
                    time.sleep(0.01)
        """)
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(program), str(tmp_path / "started")],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_of_the_program_that_ends_leaves_the_evaluator_of_its_parent_alone(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        _POOL
        + textwrap.dedent("""
            def run(job):
                job.record(heard=True)
                while not pathlib.Path(job["go"]).exists():
                    time.sleep(0.01)

            if __name__ == "__main__":
                with Evaluator(run, Pool(1)) as evaluator:
                    for go in (sys.argv[1] + ".1", sys.argv[1] + ".2"):
                        (job,) = evaluator.submit([{"go": go}])
                        while not job.records:
                            time.sleep(0.01)
                        pathlib.Path(go).touch()
                        evaluator.gather("ALL")
                        child = os.fork()
                        if not child:
                            sys.exit(7)
                        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
                print("heard")
        """)
    )
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "go")], capture_output=True, text=True, timeout=BOUND, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_two_backends_in_one_process_do_not_hear_of_each_other(files: Files) -> None:
    heed = functions.Plain(functions.heed)
    with Evaluator(heed, Threads(1), grace=BOUND) as one, Evaluator(heed, Threads(1), grace=BOUND) as other:
        (mine,), (theirs,) = one.submit([files.holder("mine")]), other.submit([files.holder("theirs")])
        files.wait_started("mine")
        files.wait_started("theirs")
        mine.cancel()
        one.gather("ALL")
        assert theirs.state is not JobState.CANCELLING
        files.release("theirs")
        other.gather("ALL")
    assert (mine.state, theirs.output) == (JobState.CANCELLED, "released")


def test_a_thread_that_a_job_left_behind_is_not_heard() -> None:
    late = threading.Event()

    def leave(job: Any) -> None:
        def report() -> None:
            late.wait(BOUND)
            job.record(late=True)
            job.report(1.0, "late")

        threads.append(threading.Thread(target=report))
        threads[-1].start()

    threads: list[threading.Thread] = []
    with Evaluator(leave, Threads(1)) as evaluator:
        jobs: Sequence[Job] = evaluator.submit([{}])
        evaluator.gather("ALL")
        late.set()
        for thread in threads:
            thread.join(BOUND)
    assert (jobs[0].records, jobs[0].status.phase) == ([], "")
