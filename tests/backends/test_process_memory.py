"""``job_memory`` of the process backend, and the kernel's own killing for want of memory."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from process_fixtures import Make, gather

from evalkit import Evaluator, JobCause, JobState, RetryPolicy, RunningJob
from evalkit.backends.process.memory import OutOfMemory, parse_bytes, show_bytes
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, eventually


def _balloon(job: RunningJob) -> int:
    """Take memory: here, or in a child in a session of its own; then wait to be killed."""
    print("about to take", job["megabytes"])
    if job.get("child"):
        code = f"import time; data = b'x' * ({job['megabytes']} << 20); time.sleep({job['seconds']})"
        subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True)
        return job["megabytes"]
    data = b"x" * (job["megabytes"] << 20)
    time.sleep(job["seconds"])
    return len(data) >> 20


@pytest.mark.parametrize("child", [False, True], ids=["itself", "a child"])
def test_a_job_that_takes_too_much_is_killed(make: Make, child: bool) -> None:
    evaluator = make(_balloon, num_workers=2, job_memory="200MB")
    big, small = evaluator.submit(
        [{"megabytes": 300, "seconds": 600, "child": child}, {"megabytes": 20, "seconds": 0.3, "child": child}]
    )
    gather(evaluator)
    assert (big.state, big.cause) == (JobState.FAILED, JobCause.MEMORY)
    assert big.error.type == "JobMemoryExceeded"
    assert "more than job_memory=200 MB" in big.error.message
    assert big.log == "about to take 300\n"
    assert (small.state, small.output) == (JobState.DONE, 20)
    later = evaluator.submit([{"megabytes": 1, "seconds": 0}] * 4)
    gather(evaluator)
    assert {job.output for job in later} == {1}, "the pool is whole"


def _balloon_at_first(job: RunningJob) -> int:
    if job.attempt == 0:
        return _balloon(job)
    return job.attempt


def test_it_runs_again_if_the_policy_says_so(make: Make) -> None:
    evaluator = make(_balloon_at_first, job_memory=200_000_000, retries=RetryPolicy(memory=1))
    (job,) = evaluator.submit([{"megabytes": 300, "seconds": 600}])
    gather(evaluator)
    assert (job.state, job.output, job.attempt) == (JobState.DONE, 1, 1)


def _share(job: RunningJob) -> str:
    """Four processes with one large block between them."""
    block = mmap.mmap(-1, 100 << 20)
    block.write(b"x" * (100 << 20))
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            total = sum(block[at] for at in range(0, len(block), 4096))
            time.sleep(0.5)
            os._exit(0 if total else 1)
        children.append(child)
    return str([os.waitpid(child, 0)[1] for child in children])


def test_memory_that_processes_share_counts_once(make: Make) -> None:
    evaluator = make(_share, job_memory="250MB")
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    assert (job.error, job.output) == (None, "[0, 0, 0]")


def test_a_limit_below_what_a_worker_takes_by_itself_is_said(make: Make) -> None:
    evaluator = make(lambda job: time.sleep(BOUND), job_memory="1MB")  # longer than it takes to look
    (job,) = evaluator.submit([{"x": 1}])
    gather(evaluator)
    assert job.is_failed
    assert "more than job_memory=1 MB" in str(job.error)


@pytest.mark.parametrize("value", [0, -1, True, "much", "1 GHz", "-1GB", float("nan"), float("inf"), [1], b"1GB"])
def test_no_number_of_bytes(value: Any) -> None:
    with pytest.raises(ValueError, match="job_memory takes a positive number of bytes"):
        Evaluator.create(functions.echo, "process", {"job_memory": value})


@pytest.mark.parametrize("method", ["serial", "thread"])
def test_backends_that_cannot_limit_memory_refuse_to(method: str) -> None:
    with pytest.raises(ValueError, match="has no option 'job_memory'"):
        Evaluator.create(functions.echo, method, {"job_memory": "1GB"})


def test_numbers_of_bytes() -> None:
    assert [parse_bytes("x", value) for value in (5, 1e9, "7", "2GB", "1.5 gib", "3k", "4 KiB", " 1TB ")] == [
        *(5, 10**9, 7, 2 * 10**9, 3 * 2**29, 3000, 4096),
        10**12,
    ]
    assert [show_bytes(number) for number in (7, 1000, 1_500_000, 999_700_000, 2 * 10**9, 3 * 10**15)] == [
        *("7 B", "1 KB", "1.5 MB", "1 GB", "2 GB"),
        "3e+03 TB",
    ]


# -- the kernel's own killing -----------------------------------------------------------------------------------------


def _kill_itself(job: RunningJob) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_plain_sigkill_is_a_crash(make: Make) -> None:
    evaluator = make(_kill_itself)
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    assert (job.cause, job.error.signal) == (JobCause.CRASH, "SIGKILL")
    known = OutOfMemory().struck() is not None
    assert ("this machine does not say" in job.error.message) is not known


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group in which there is little memory."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"evalkit-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(300 << 20))
    except OSError as exc:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {exc}")
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text(), "the end of all in the control group")
    group.rmdir()


@pytest.mark.slow
def test_a_kill_by_the_kernel_for_want_of_memory_is_told_apart(small_group: Path, tmp_path: Path) -> None:
    script = tmp_path / "master.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, pathlib
            pathlib.Path({str(small_group / "cgroup.procs")!r}).write_text(str(os.getpid()))
            import test_process_memory
            from evalkit import Evaluator
            with Evaluator.create(test_process_memory._oom_or_kill, "process", {{"num_workers": 1}}) as evaluator:
                evaluator.submit([{{"megabytes": 20}}, {{"megabytes": 600}}, {{"megabytes": 0}}, {{"megabytes": 20}}])
                for job in evaluator.gather("ALL"):
                    print(job.state, job.cause, job.error and job.error.type)
        """)
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, timeout=2 * BOUND, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "DONE None None",
        "FAILED MEMORY OutOfMemory",
        "FAILED CRASH WorkerDied",
        "DONE None None",
    ], done.stderr


def _oom_or_kill(job: RunningJob) -> int:
    if not job["megabytes"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(b"x" * (job["megabytes"] << 20))
