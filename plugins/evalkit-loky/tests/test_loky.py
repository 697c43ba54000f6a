"""The loky backend against the suite that all are held to, and what is its own."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from loky import get_reusable_executor

from evalkit import Evaluator, JobCause, JobState
from evalkit.testing import BackendSuite, functions
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, gathering, in_background
from evalkit_loky.workers import LokyWorkers

Make = Callable[..., Evaluator]


class TestLoky(BackendSuite):
    method = "loky"


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Evaluator] = []

    def make(function: Callable[..., Any], **kwargs: Any) -> Evaluator:
        made.append(Evaluator.create(function, "loky", {"num_workers": 2, "grace": 0.2, **kwargs}))
        return made[-1]

    yield make
    for evaluator in made:
        evaluator.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.release_all()


def pid_of(_job: Any) -> int:
    return os.getpid()


def count_runs(job: Any) -> Any:
    with open(job["runs"], "a") as file:
        file.write("x")
    return functions.Plain(functions.hold)(job)


def start_a_child(job: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(job["child"] + ".new").write_text(str(child.pid))
    Path(job["child"] + ".new").rename(job["child"])
    time.sleep(600)


def fork_and_die(job: Any) -> None:
    child = os.fork()
    if child:
        Path(job["child"] + ".new").write_text(str(child))
        Path(job["child"] + ".new").rename(job["child"])
        os._exit(3)
    time.sleep(600)


# -- deaths and kills -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["crash", "cancel", "killed from outside"])
def test_the_end_of_one_worker_is_no_matter_of_the_others(make: Make, files: Files, how: str) -> None:
    evaluator = make(count_runs)
    innocent, doomed = evaluator.submit([{"runs": files[f"{name}.runs"], **files.holder(name)} for name in ("a", "b")])
    with gathering(evaluator):
        first, second = files.wait_started("a"), files.wait_started("b")
        eventually(lambda: doomed.is_running, "the start of the job")
        if how == "cancel":
            doomed.cancel()
        else:
            os.kill(second, 11 if how == "crash" else 9)
        eventually(lambda: doomed.is_complete, "the end of the job")
        assert psutil.pid_exists(first)
        files.release("a")
    assert (innocent.state, files.wait("a.runs")) == (JobState.DONE, "x")
    if how == "cancel":
        assert doomed.state is JobState.CANCELLED
    else:
        signal = "SIGSEGV" if how == "crash" else "SIGKILL"
        assert (doomed.cause, doomed.error and doomed.error.signal) == (JobCause.CRASH, signal)
    assert files.wait("b.runs") == "x"


def test_a_job_past_its_time_goes_with_what_it_has_started(make: Make, files: Files) -> None:
    evaluator = make(start_a_child, job_timeout=2.0)
    evaluator.submit([{"child": files["child"]}])
    (job,) = in_background(evaluator.gather, "ALL").result(BOUND)
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)
    child = int(files.wait("child"))
    eventually(lambda: not _lives(child), "the end of the child")


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_worker_that_dies_while_it_has_nothing_to_do_is_replaced(make: Make) -> None:
    evaluator = make(pid_of, num_workers=1)
    (job,) = evaluator.submit([{}])
    evaluator.gather("ALL")
    os.kill(job.output, 9)
    eventually(lambda: not psutil.pid_exists(job.output), "the end of the worker")
    (later,) = evaluator.submit([{}])
    in_background(evaluator.gather, "ALL").result(BOUND)
    assert later.is_success
    assert later.output != job.output


def test_of_cheap_jobs_that_share_a_call_the_one_to_blame_fails(make: Make) -> None:
    evaluator = make(functions.die)
    jobs = evaluator.submit([{"x": x, "how": "abort" if x == 1500 else None} for x in range(2000)])
    in_background(evaluator.gather, "ALL").result(2 * BOUND)
    assert [job.args["x"] for job in jobs if not job.is_success] == [1500]
    assert (jobs[1500].cause, jobs[1500].error.signal) == (JobCause.CRASH, "SIGABRT")


# -- nothing is shared ------------------------------------------------------------------------------------------------


def test_the_workers_are_not_those_that_joblib_uses(make: Make) -> None:
    shared = get_reusable_executor(2)
    try:
        theirs = {shared.submit(os.getpid).result(BOUND) for _ in range(20)}
        evaluator = make(pid_of)
        evaluator.submit([{}] * 20)
        ours = {job.output for job in evaluator.gather("ALL")}
        assert not ours & theirs
        shared.shutdown(wait=True, kill_workers=True)
        evaluator.submit([{}])
        assert evaluator.gather("ALL")[0].output in ours
    finally:
        shared.shutdown(wait=True)
    fresh = get_reusable_executor(1)
    evaluator.close()
    assert fresh.submit(abs, -1).result(BOUND) == 1
    fresh.shutdown(wait=True)


# -- functions and programs -------------------------------------------------------------------------------------------


def run_program(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, "-W", "error", str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=2 * BOUND,
        check=False,
    )


@pytest.mark.parametrize("submit", ["evaluator.submit([{}])", "pass"])
def test_a_program_ends_with_an_evaluator_that_is_open(tmp_path: Path, submit: str) -> None:
    program = """
        from evalkit import Evaluator
        evaluator = Evaluator.create(lambda job: None, "loky", {"num_workers": 2})
    """
    done = run_program(tmp_path, program + f"    {submit}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_that_forks_may_die_like_any_other(make: Make, files: Files) -> None:
    """Its child holds the connection open."""
    evaluator = make(fork_and_die, num_workers=1)
    (job,) = evaluator.submit([{"child": files["child"]}])
    try:
        in_background(evaluator.gather, "ALL").result(BOUND)
    finally:
        os.kill(int(files.wait("child")), 9)
    assert (job.cause, job.error and job.error.exit_code) == (JobCause.CRASH, 3)


def _closes_everything(_job: Any) -> None:
    atexit.register(time.sleep, 600)  # a worker has much to do on its way out, and a busy machine takes its time
    os.closerange(0, 4096)


def test_a_worker_that_cannot_answer_dies_at_once_and_with_an_exit_code(make: Make) -> None:
    evaluator = make(_closes_everything, num_workers=1)
    (job,) = evaluator.submit([{}])
    in_background(evaluator.gather, "ALL").result(BOUND)
    assert (job.cause, job.error and job.error.exit_code) == (JobCause.CRASH, 1)


def _forks_in_c(job: Any) -> bool:
    child = ctypes.PyDLL(None).fork() if job["x"] == 5 else None
    if child:
        os.waitpid(child, 0)
    return child == 0


def test_a_fork_that_python_is_not_told_of_does_not_answer_for_the_worker(make: Make) -> None:
    evaluator = make(_forks_in_c, num_workers=1)
    jobs = evaluator.submit([{"x": x} for x in range(20)])
    assert evaluator.gather("ALL") == jobs
    assert [job.output for job in jobs] == 20 * [False]


class _Names:
    """Stands for a program: a chunk is a file to wait for, and then maybe a word."""

    def install(self) -> None:
        pass

    @property
    def resident(self) -> Callable[[bytes], bytes]:
        return _answer


def _answer(chunk: bytes) -> bytes:
    path, _, word = chunk.decode().partition(":")
    while path and not os.path.exists(path):
        time.sleep(0.01)
    if word == "die":
        os._exit(3)
    return str(os.getpid()).encode()


def test_what_is_sent_at_the_news_of_a_death_goes_to_different_workers(tmp_path: Path) -> None:
    """Two in one worker would be to blame together, and the second has not even started."""
    names: Any = _Names()
    workers = LokyWorkers(2, names, print)
    try:
        first = workers.submit(names, f"{tmp_path / 'first'}:".encode())
        second = workers.submit(names, f"{tmp_path / 'second'}:die".encode())
        sent: Future[list[Future[bytes]]] = Future()
        chunk = f"{tmp_path / 'both'}:".encode()  # so that the first is still there when the second is sent
        second.add_done_callback(lambda _: sent.set_result([workers.submit(names, chunk) for _ in range(2)]))
        (tmp_path / "first").touch()
        first.result(BOUND)  # the other worker has nothing to do, and is the first to be asked
        (tmp_path / "second").touch()
        calls = sent.result(BOUND)
        (tmp_path / "both").touch()
        assert len({call.result(BOUND) for call in calls}) == 2
    finally:
        workers.end(BOUND, kill=True)


def test_a_worker_that_takes_nothing_holds_up_nobody(make: Make) -> None:
    evaluator = make(lambda job: os.getpid(), num_workers=1)
    (job,) = evaluator.submit([{}])
    evaluator.gather("ALL")
    os.kill(job.output, signal.SIGSTOP)
    in_background(evaluator.submit, [{"x": bytes(3 * 2**20)}]).result(BOUND)
    in_background(evaluator.close).result(BOUND)
    eventually(lambda: not _lives(job.output), "the end of the worker")


def test_workers_that_cannot_all_start_leave_none(tmp_path: Path) -> None:
    done = run_program(
        tmp_path,
        """
        import resource
        from evalkit import Evaluator
        from evalkit.errors import BackendError

        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            Evaluator.create(lambda job: 1, "loky", {"num_workers": 12})
        except BackendError as exc:
            print(exc)
        """,
    )
    assert done.returncode == 0
    assert "Too many open files" in done.stdout


def policy_of(_job: Any) -> int:
    return os.sched_getscheduler(0)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux")
def test_a_worker_that_wakes_up_does_not_take_the_processor_from_the_main_process(make: Make) -> None:
    before = os.sched_getscheduler(0)
    (job,) = make(policy_of).submit([{}])
    assert job.result(BOUND) == (os.SCHED_BATCH if before == os.SCHED_OTHER else before)
    assert os.sched_getscheduler(0) == before


def test_a_large_argument_and_output_pass(make: Make) -> None:
    evaluator = make(lambda job: job["x"] + b"!", num_workers=2)
    large = bytes(20 * 2**20)
    evaluator.submit([{"x": large}] * 3)
    assert [job.output == large + b"!" for job in in_background(evaluator.gather, "ALL").result(BOUND)] == [True] * 3


@pytest.mark.parametrize("end", ["evaluator.close()", "pass"])
def test_a_program_needs_no_guard_and_leaves_no_words_behind(tmp_path: Path, end: str) -> None:
    done = run_program(
        tmp_path,
        f"""
        import functools
        from dataclasses import dataclass
        from evalkit import Evaluator

        @dataclass
        class Point:
            x: float

        def square(job, power):
            return Point(job["point"].x ** power)

        evaluator = Evaluator.create(
            square, "loky", {{"num_workers": 2, "run_function_kwargs": {{"power": 2}}, "worker_init": lambda: 5}}
        )
        evaluator.submit([{{"point": Point(x)}} for x in range(3)])
        print([job.output for job in evaluator.gather("ALL")])
        {end}
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "[Point(x=0), Point(x=1), Point(x=4)]"


def test_the_workers_end_with_a_main_process_that_is_killed(tmp_path: Path, files: Files) -> None:
    program = f"""
        import subprocess, sys, time
        from evalkit import Evaluator
        from evalkit.testing import functions

        def run(job):
            if job["x"]:
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            return functions.Plain(functions.hold)(job)

        evaluator = Evaluator.create(run, "loky", {{"num_workers": 3}})
        evaluator.submit([{{"x": 0}}, {files.holder("a", x=1)!r}])
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path) as main:
        files.wait_started("a")
        family = psutil.Process(main.pid).children(recursive=True)
        assert len(family) >= 4, "the workers, and what a job has started"
        main.kill()
    workers = [process for process in family if "resource_tracker" not in _command(process)]
    eventually(lambda: not [process for process in workers if _lives(process.pid)], "the end of all of them")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_ctrl_c_is_for_the_main_process_and_jobs_go_on(tmp_path: Path) -> None:
    done = run_program(
        tmp_path,
        """
        import os, pathlib, signal, time
        from evalkit import Evaluator

        def run(job):
            pathlib.Path("started").touch()
            while not pathlib.Path("release").exists():
                time.sleep(0.01)
            return "done"

        os.setpgrp()
        evaluator = Evaluator.create(run, "loky", {"num_workers": 1})
        evaluator.submit([{}])
        while not pathlib.Path("started").exists():
            time.sleep(0.01)
        try:
            os.killpg(0, signal.SIGINT)
            evaluator.gather("ALL")
        except KeyboardInterrupt:
            print("interrupted")
        pathlib.Path("release").touch()
        print([job.output for job in evaluator.gather("ALL")])
        evaluator.close()
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[:2] == ["interrupted", "['done']"]


def test_a_module_that_workers_cannot_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "only_here.py").write_text("def run(job):\n    return 1\n")
    done = run_program(
        tmp_path,
        """
        import shutil, sys
        from evalkit import Evaluator

        sys.path.insert(0, "hidden")
        import only_here
        shutil.rmtree("hidden")

        with Evaluator.create(only_here.run, "loky", {"num_workers": 1}) as evaluator:
            evaluator.submit([{}, {}])
            for job in evaluator.gather("ALL"):
                print(job.state, job.cause, job.error)
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["FAILED EXCEPTION ModuleNotFoundError: No module named 'only_here'"] * 2


def test_a_large_function_goes_to_each_worker_once(make: Make) -> None:
    table = bytes(50 * 2**20)
    evaluator = make(lambda job: len(table) + job["x"])
    start = time.process_time()
    evaluator.submit([{"x": x} for x in range(1000)])
    jobs = in_background(evaluator.gather, "ALL").result(2 * BOUND)
    assert [job.output for job in jobs] == [len(table) + x for x in range(1000)]
    # A copy of it for each of the first calls alone would take several times as long.
    assert time.process_time() - start < BOUND


def test_options_that_make_no_sense_are_refused() -> None:
    for options, said in (
        ({"hold": -1}, "hold"),
        ({"batching": 3}, "batching"),
        ({"worker_init": 3}, "worker_init"),
        ({"initializer": print}, "initializer"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            Evaluator.create(pid_of, "loky", options)
