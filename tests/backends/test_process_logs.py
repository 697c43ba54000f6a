"""What jobs print on the process backend: whose log it is in, whatever the job does, and what that costs."""

from __future__ import annotations

import ctypes
import gc
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from process_fixtures import Make, gather

from evalkit import JobCause, JobState, RetryPolicy, RunningJob
from evalkit.backends.process import capture
from evalkit.joblog import JobLog
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, in_background

pytestmark = pytest.mark.skipif(not capture.can_capture(), reason="there is no capture on this system")


def log_of(make: Make, function: Callable[..., Any], **args: Any) -> str:
    evaluator = make(function)
    (job,) = evaluator.submit([args])
    gather(evaluator)
    return job.log


# -- from wherever it is printed --------------------------------------------------------------------------------------


def _prints_in_every_way(job: RunningJob) -> None:
    print("stdout", job["x"])
    print("stderr", file=sys.stderr)
    logging.getLogger("user").warning("logged")
    ctypes.CDLL(None).puts(b"from C")
    ctypes.CDLL(None).printf(b"no line end,")
    os.write(1, b" descriptor\n")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    os.system("echo from a shell >&2")
    child = os.fork()
    if child == 0:
        print("from a fork")
        os._exit(0)
    os.waitpid(child, 0)
    thread = threading.Thread(target=print, args=("from a thread",))
    thread.start()
    thread.join()


def test_everything_that_a_job_prints_is_its_log_in_order(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    evaluator = make(_prints_in_every_way, num_workers=2)
    jobs = evaluator.submit([{"x": x} for x in range(6)])
    gather(evaluator)
    for job in jobs:
        assert job.error is None
        assert job.log == (
            f"stdout {job.args['x']}\nstderr\nlogged\nfrom C\n"
            "no line end, descriptor\nfrom a child\nfrom a shell\nfrom a fork\nfrom a thread\n"
        )
        assert evaluator.storage.load_log(job.id) == job.log
    assert capfd.readouterr() == ("", ""), "it does not come out of the program as well"


def _print_sometimes(job: RunningJob) -> None:
    if job["x"] % 3 == 0:
        print(job["x"], end="")


def test_a_log_is_of_one_job_alone(make: Make) -> None:
    evaluator = make(_print_sometimes, num_workers=2)
    jobs = evaluator.submit([{"x": x} for x in range(1000)])
    gather(evaluator)
    assert [job.log for job in jobs] == [str(x) if x % 3 == 0 else "" for x in range(1000)]
    assert {job.printed is None for job in jobs} == {True, False}


async def _prints_as_coroutine(job: RunningJob) -> None:
    print("from a coroutine")


def test_a_coroutine(make: Make) -> None:
    assert log_of(make, _prints_as_coroutine) == "from a coroutine\n"


def _prints_odd(job: RunningJob) -> None:
    sys.stdout.buffer.write(b"\xff\xfe ")
    print("nul \0 in it, half a pair: \ud800, ☃")


def test_what_is_not_text(make: Make, tmp_path: Path) -> None:
    evaluator = make(_prints_odd, storage=f"sqlite:///{tmp_path}/study.db")
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    assert job.error is None
    assert job.log == "\\xff\\xfe nul \0 in it, half a pair: \\ud800, ☃\n"
    assert evaluator.storage.load_log(job.id) == job.log


def _replaces_stdout(job: RunningJob) -> str:
    print("before,", end=" ")
    if job["how"] == "closed":
        sys.stdout.close()
    sys.stdout = swallowing = io.StringIO()
    print("swallowed")
    if job["how"] == "nothing":
        sys.stdout = None
    if job["how"] == "the interpreter's":
        sys.stdout = sys.__stdout__
        print("after")
    return swallowing.getvalue()


@pytest.mark.parametrize("how", ["the interpreter's", "nothing", "closed", "left"])
def test_a_job_that_replaces_stdout(make: Make, how: str) -> None:
    evaluator = make(_replaces_stdout)
    jobs = evaluator.submit([{"how": how}, {"how": how}])
    gather(evaluator)
    assert [job.output for job in jobs] == ["swallowed\n"] * 2
    # The second job has a stream again, whatever the first has made of it.
    assert [job.log for job in jobs] == ["before, after\n" if how == "the interpreter's" else "before, "] * 2


def _init_that_tees() -> None:
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))


def test_streams_of_worker_init_stay(make: Make) -> None:
    evaluator = make(_print_sometimes, worker_init=_init_that_tees)
    jobs = evaluator.submit([{"x": x} for x in range(4)])
    gather(evaluator)
    assert [job.log for job in jobs] == ["0", "", "", "3"], "what they hold back comes in time"


def _ruins_its_descriptors(job: RunningJob) -> str:
    print("before")
    if job["how"] == "close":
        os.close(1)
        os.close(2)
    elif job["how"] == "close all":
        for fd in os.listdir("/proc/self/fd"):
            if "evalkit-log" in os.path.realpath(f"/proc/self/fd/{fd}"):
                os.close(int(fd))
    else:
        os.system("echo anew > /dev/stdout")
        print("after")
    return "fine"


@pytest.mark.parametrize(("how", "log"), [("close", "before\n"), ("close all", ""), ("open anew", "anew\nafter\n")])
def test_a_job_that_ruins_its_descriptors(make: Make, how: str, log: str) -> None:
    evaluator = make(_ruins_its_descriptors)
    evaluator.submit([{"how": how}])
    (job,) = gather(evaluator)
    assert (job.output, job.error) == ("fine", None)
    assert job.log == log


def _init_that_prints() -> None:
    print("from worker_init")


def test_what_worker_init_prints_is_no_jobs(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    evaluator = make(_print_sometimes, worker_init=_init_that_prints)
    (job,) = evaluator.submit([{"x": 0}])
    gather(evaluator)
    assert job.log == "0"
    assert capfd.readouterr().out == "from worker_init\n"


def test_capture_can_be_off(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    evaluator = make(_print_sometimes, capture=False)
    (job,) = evaluator.submit([{"x": 0}])
    gather(evaluator)
    assert (job.log, job.printed) == ("", None)
    assert capfd.readouterr().out == "0"
    with pytest.raises(TypeError, match="capture takes True or False, not 'no'"):
        make(_print_sometimes, capture="no")


def test_a_program_without_stdout_has_logs(tmp_path: Path) -> None:
    script = tmp_path / "silent.py"
    script.write_text("""
import os, sys
for fd in (0, 1, 2):
    os.close(fd)
sys.stdin = sys.stdout = sys.stderr = None
from evalkit import Evaluator
def run(job):
    print("hello")
    os.system("echo child")
with Evaluator.create(run, "process", {"num_workers": 2}) as evaluator:
    evaluator.submit([{}] * 5)
    logs = {job.log for job in evaluator.gather("ALL")}
open(sys.argv[1], "w").write(repr(logs))
""")
    result = tmp_path / "logs"
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, str(script), str(result)], timeout=BOUND, check=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert result.read_text() == r"{'hello\nchild\n'}"


# -- ends -------------------------------------------------------------------------------------------------------------


def _prints_and_dies(job: RunningJob) -> None:
    print("last words,", end=" ")
    ctypes.CDLL(None).printf(b"also in C")
    how = job["how"]
    if how == "raise":
        raise ValueError("on purpose")
    if how == "segv":
        ctypes.string_at(0)
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("raise", JobCause.EXCEPTION),
        ("kill", JobCause.CRASH),
        ("segv", JobCause.CRASH),
        ("exit", JobCause.CRASH),
        ("hang", JobCause.TIMEOUT),
    ],
)
def test_whatever_ends_a_job_its_log_is_whole(make: Make, how: str, cause: JobCause) -> None:
    evaluator = make(_prints_and_dies, job_timeout=2.0 if how == "hang" else None)
    (job,) = evaluator.submit([{"how": how}])
    gather(evaluator)
    assert (job.state, job.cause) == (JobState.FAILED, cause)
    assert job.log.startswith("last words, also in C")
    assert evaluator.storage.load_log(job.id) == job.log
    if how == "segv":
        assert "Segmentation fault" in job.log
        assert "_prints_and_dies" in job.log, "where it was is said"


def test_a_job_that_close_cancels_keeps_its_log(make: Make, tmp_path: Path) -> None:
    evaluator = make(_prints_and_dies)
    (job,) = evaluator.submit([{"how": "hang"}])
    eventually(lambda: "in C" in job.log, "what it has printed")
    in_background(evaluator.close).result(BOUND)
    assert job.state is JobState.CANCELLED
    assert job.log.startswith("last words, also in C")


def _prints_its_attempt(job: RunningJob) -> None:
    print("attempt", job.attempt)
    if job.attempt == 0:
        os._exit(1)


def test_the_log_is_that_of_the_last_attempt(make: Make) -> None:
    evaluator = make(_prints_its_attempt, retries=RetryPolicy(crash=1))
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    assert (job.state, job.log) == (JobState.DONE, "attempt 1\n")


def _leaves_a_child_that_prints(job: RunningJob) -> None:
    subprocess.Popen(
        ["sh", "-c", f"while [ ! -e {job['release']} ]; do sleep 0.05; done; echo late; touch {job['done']}"]
    )


def test_a_child_that_outlives_its_job_holds_up_nobody(make: Make, files: Files) -> None:
    evaluator = make(_leaves_a_child_that_prints)
    (job,) = evaluator.submit([{"release": files["release"], "done": files["done"]}])
    gather(evaluator)
    assert (job.state, job.log) == (JobState.DONE, "")
    files.create("release")
    files.wait("done")
    assert job.log == "", "what has ended does not change"


# -- while it runs ----------------------------------------------------------------------------------------------------


def _prints_step_by_step(job: RunningJob) -> None:
    for step in range(3):
        print("step", step)
        functions._touch(job[f"at{step}"])
        while not os.path.exists(job[f"go{step}"]):
            time.sleep(0.01)


def test_a_log_can_be_read_while_the_job_runs(make: Make, files: Files) -> None:
    evaluator = make(_prints_step_by_step)
    steps = {f"{name}{step}": files[f"{name}{step}"] for step in range(3) for name in ("at", "go")}
    (job,) = evaluator.submit([steps])
    seen, text = 0, ""
    for step in range(3):
        files.wait(f"at{step}")
        eventually(lambda: job.is_running, "the start of the job")
        assert job.log == "".join(f"step {before}\n" for before in range(step + 1))
        text += job.printed.since(seen).decode()
        seen = job.printed.size
        files.create(f"go{step}")
    gather(evaluator)
    assert job.log == text == "step 0\nstep 1\nstep 2\n"


def test_reading_all_the_time_disturbs_nobody(make: Make) -> None:
    evaluator = make(_print_sometimes, num_workers=2)
    jobs = evaluator.submit([{"x": 3 * x} for x in range(300)])
    gathered = in_background(evaluator.gather, "ALL")
    wrong: list[tuple[str, str]] = []
    while not gathered.done():
        for job in jobs:
            log = job.log
            if log and not str(job.args["x"]).startswith(log):
                wrong.append((log, str(job.args["x"])))
    assert gathered.result(BOUND) == jobs
    assert wrong == []
    assert [job.log for job in jobs] == [str(3 * x) for x in range(300)]


# -- bounds -----------------------------------------------------------------------------------------------------------


def _prints_a_lot(job: RunningJob) -> None:
    print("the beginning")
    for _ in range(job["megabytes"]):
        os.write(1, b"x" * 2**20)
    print("\nthe end")


def test_the_middle_of_a_long_log_is_left_out(make: Make) -> None:
    evaluator = make(_prints_a_lot)
    long, short = evaluator.submit([{"megabytes": 5}, {"megabytes": 0}])
    gather(evaluator)
    size = 5 * 2**20 + len("the beginning\n\nthe end\n")
    assert long.printed.size == size
    assert long.printed.dropped == size - capture.HEAD - capture.TAIL
    assert long.log.startswith("the beginning\nxxx")
    assert long.log.endswith("xxx\nthe end\n")
    assert f"[... {long.printed.dropped:,} bytes were not kept ...]" in long.log
    assert short.log == "the beginning\n\nthe end\n"


def _prints_for_ever(job: RunningJob) -> None:
    functions._touch(job["started"], str(os.getpid()))
    print("the beginning")
    while not os.path.exists(job["release"]):
        os.write(1, b"x" * 2**16)
        time.sleep(0.0005)
    print("\nthe end")


def _memory_of_log(pid: int) -> int:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if "evalkit-log" in os.readlink(f"/proc/{pid}/fd/{fd}"):
            return os.stat(f"/proc/{pid}/fd/{fd}").st_blocks * 512
    return 0


@pytest.mark.slow
def test_a_job_that_prints_gigabytes_fills_neither_memory_nor_disk(make: Make, files: Files) -> None:
    evaluator = make(_prints_for_ever)
    (job,) = evaluator.submit([files.holder("a")])
    pid = files.wait_started("a")
    eventually(lambda: job.printed is not None and job.printed.size > 2**29, "half a gigabyte of output")
    assert _memory_of_log(pid) < 2**27, "a fraction of it is in memory"
    assert "\0" not in job.log
    files.release("a")
    gather(evaluator)
    assert job.log.startswith("the beginning\nxxx")
    assert job.log.endswith("xxx\nthe end\n")
    assert "\0" not in job.log
    assert len(job.log) < 2**17
    jobs = evaluator.submit([files.holder("a")] * 20)
    gather(evaluator)
    assert {one.log for one in jobs} == {"the beginning\n\nthe end\n"}
    eventually(lambda: _memory_of_log(pid) < 2**23, "little to be left of it when it is over")


def test_logs_of_many_jobs_do_not_pile_up_in_the_worker(make: Make) -> None:
    evaluator = make(_prints_a_lot)
    jobs = evaluator.submit([{"megabytes": 1}] * 60)
    gather(evaluator)
    assert {job.state for job in jobs} == {JobState.DONE}
    pid = jobs[0].metadata["pid"]
    eventually(lambda: _memory_of_log(pid) < 2**23, "the memory to be given back")


def test_descriptors_do_not_pile_up(make: Make) -> None:
    evaluator = make(_prints_and_dies, num_workers=2)
    me = psutil.Process()
    evaluator.submit([{"how": "exit"}] * 4)
    gather(evaluator)
    before = me.num_fds()  # of a pool that may be about to have a worker more
    evaluator.submit([{"how": "exit"}] * 20)
    gather(evaluator)
    eventually(lambda: me.num_fds() < before + 20, "about as few descriptors as before")


def test_memory_does_not_hold_the_logs_of_all_jobs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalkit.storage.memory_table._MAX_LOG_SIZE", 2**18)
    evaluator = make(_prints_a_lot)
    kept = []
    for _ in range(3):
        ids = [job.id for job in evaluator.submit([{"megabytes": 1}] * 5)]
        gather(evaluator)
        gc.collect()
        kept.append(sum(type(one) is JobLog for one in gc.get_objects()))
    assert max(kept) < 10
    assert evaluator.storage.load_log(ids[-1]).startswith("the beginning")


# -- JobLog -----------------------------------------------------------------------------------------------------------


def test_a_log_since_a_position() -> None:
    log = JobLog(b"head", 100, b"tail")
    assert log.size == 108
    assert log.since(0) == b"head\n[... 100 bytes were not kept ...]\ntail"
    assert log.since(2) == b"ad\n[... 100 bytes were not kept ...]\ntail"
    assert log.since(4) == b"\n[... 100 bytes were not kept ...]\ntail"
    assert log.since(14) == b"\n[... 90 bytes were not kept ...]\ntail"
    assert [log.since(at) for at in (104, 106, 108)] == [b"tail", b"il", b""]
    assert [JobLog(b"whole").since(at) for at in (0, 2, 5)] == [b"whole", b"ole", b""]


def test_a_character_that_was_cut_is_left_out() -> None:
    snow = "☃".encode()
    text = str(JobLog(b"a" + snow[:2], 10, snow[2:] + b"b"))
    assert text == "a\n[... 10 bytes were not kept ...]\nb"
    assert str(JobLog(snow)) == "☃"
