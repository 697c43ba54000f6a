"""What jobs start on the process backend, and when it ends: nothing outlives its worker, wherever it has moved to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from process_fixtures import Make, alive, gather

from evalkit import JobCause, JobState, RunningJob
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import Files, eventually


def _fork(then: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        then()
        os._exit(0)


def _note(folder: str) -> None:
    """Say which process this is."""
    scratch = Path(folder, f".{os.getpid()}")
    scratch.touch()
    scratch.rename(Path(folder, str(os.getpid())))


def _sleep(folder: str) -> None:
    _note(folder)
    while True:
        time.sleep(600)


def _daemon(folder: str) -> None:
    """As daemons do: the parent ends, the session is another, the environment is empty."""
    os.setsid()
    _fork(lambda: os.execve(sys.executable, [sys.executable, "-c", _SLEEPER, folder], {}))


_SLEEPER = "import os, sys, time; open(os.path.join(sys.argv[1], str(os.getpid())), 'x').close(); time.sleep(600)"
_FAMILY = 7  # processes that _start_family notes, itself included


def _start_family(job: RunningJob) -> None:
    """Start children of every kind, as a job that has gone wild would, and end in some way."""
    folder = job["folder"]

    def deaf() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _sleep(folder)

    subprocess.Popen([sys.executable, "-c", _SLEEPER, folder])
    subprocess.Popen([sys.executable, "-c", _SLEEPER, folder], start_new_session=True, env={})
    _fork(lambda: (os.setsid(), _fork(lambda: _sleep(folder)), time.sleep(600)))  # a grandchild in its session
    _fork(lambda: (os.setsid(), _fork(lambda: _sleep(folder))))  # an orphan in another session
    _fork(lambda: _daemon(folder))
    _fork(deaf)
    _note(folder)
    while len([name for name in os.listdir(folder) if name.isdigit()]) < _FAMILY:
        time.sleep(0.01)
    Path(folder, "complete").touch()
    how = job["how"]
    if how == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "return":
        return
    if how == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def family_in(folder: Path) -> list[int]:
    eventually((folder / "complete").exists, "the whole family")
    return [int(name) for name in os.listdir(folder) if name.isdigit()]


@pytest.mark.parametrize(
    ("how", "cause"),
    [("hang", JobCause.TIMEOUT), ("deaf", JobCause.TIMEOUT), ("crash", JobCause.CRASH)],
)
def test_when_a_job_is_ended_so_is_all_that_it_started(make: Make, tmp_path: Path, how: str, cause: JobCause) -> None:
    evaluator = make(_start_family, job_timeout=None if how == "crash" else 4.0)
    (job,) = evaluator.submit([{"folder": str(tmp_path), "how": how}])
    pids = family_in(tmp_path)
    assert len(pids) == _FAMILY
    gather(evaluator)
    assert (job.state, job.cause) == (JobState.FAILED, cause)
    assert alive(pids) == [], "when the job is back, they are gone"


def test_a_cancelled_job_takes_all_that_it_started_along(make: Make, tmp_path: Path) -> None:
    evaluator = make(_start_family)
    (job,) = evaluator.submit([{"folder": str(tmp_path), "how": "hang"}])
    pids = family_in(tmp_path)
    job.cancel()
    gather(evaluator)
    assert job.state is JobState.CANCELLED
    assert alive(pids) == []


def test_what_a_job_leaves_running_lives_until_close_at_most(make: Make, tmp_path: Path) -> None:
    evaluator = make(_start_family)
    (job,) = evaluator.submit([{"folder": str(tmp_path), "how": "return"}])
    gather(evaluator)
    assert job.is_success
    pids = family_in(tmp_path)
    assert len(alive(pids)) == _FAMILY, "a server that it started may be meant for the next job"
    evaluator.close()
    assert alive(pids) == []


def test_what_a_job_leaves_running_ends_with_its_worker(make: Make, tmp_path: Path) -> None:
    evaluator = make(_start_family, max_jobs_per_worker=1)
    (job,) = evaluator.submit([{"folder": str(tmp_path), "how": "return"}])
    gather(evaluator)
    assert job.is_success
    eventually(lambda: not alive(family_in(tmp_path)), "the end of the worker and its family")


def _cleans_up(job: RunningJob) -> None:
    """Start a child, in a session of its own, that does something when it is told to end."""
    script = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.2)\n"
        "    pathlib.Path(sys.argv[2]).touch()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(600)\n"
    )
    subprocess.Popen([sys.executable, "-c", script, job["started"], job["cleaned"]], start_new_session=True)
    time.sleep(600)


def test_children_have_the_grace_though_the_worker_is_gone(make: Make, files: Files) -> None:
    evaluator = make(_cleans_up)
    (job,) = evaluator.submit([{"started": files["started"], "cleaned": files["cleaned"]}])
    files.wait("started")
    job.cancel()
    gather(evaluator)
    assert files.exists("cleaned")


def _many_orphans(job: RunningJob) -> int:
    for _ in range(50):
        os.system("sleep 600 &")
    return os.getpid()


def test_fifty_children_do_not_outlive_close(make: Make) -> None:
    evaluator = make(_many_orphans)
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    pids = [child.pid for child in psutil.Process(job.output).children(recursive=True)]
    assert len(pids) >= 50
    evaluator.close()
    assert alive(pids) == []


def test_kill_9_of_the_master_leaves_nothing_for_five_seconds(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    script = tmp_path / "master.py"
    script.write_text(f"""
import test_process_family
from evalkit import Evaluator
evaluator = Evaluator.create(test_process_family._start_family, "process", {{"num_workers": 2, "job_memory": "10GB"}})
evaluator.submit([{{"folder": folder, "how": "deaf"}} for folder in {[str(folder) for folder in folders]!r}])
evaluator.gather("ALL")
""")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    with subprocess.Popen([sys.executable, str(script)], env=env) as master:
        pids = [pid for folder in folders for pid in family_in(folder)]
        assert len(pids) == 2 * _FAMILY
        nursery = psutil.Process(master.pid).children()[0]
        master.kill()
        eventually(lambda: not alive([*pids, nursery.pid]), "the end of everything the master had started", 5.0)


def _child(job: RunningJob) -> int:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    functions._touch(job["started"], f"{os.getppid()} {child.pid}")
    if job.attempt == 0 and not os.path.exists(job["again"]):
        time.sleep(600)
    return child.pid


def test_what_a_job_started_ends_though_the_nursery_is_killed(make: Make, files: Files) -> None:
    evaluator = make(_child)
    (job,) = evaluator.submit([{"started": files["a"], "again": files["again"]}])
    nursery, child = map(int, files.wait("a").split())
    files.create("again")
    os.kill(nursery, signal.SIGKILL)
    gather(evaluator)
    assert job.is_success
    eventually(lambda: not alive([child]), "the end of the child of the first run")


# -- jobs that do not want to end -------------------------------------------------------------------------------------


def _refuses_to_end(job: RunningJob) -> None:
    Path(job["started"]).touch()
    how = job["how"]
    if how == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(600)
    if how == "blocks in C":
        import ctypes

        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ctypes.PyDLL(None).sleep(600)  # with the interpreter's lock held
    if how == "swallows everything":
        while True:
            try:
                signal.signal(signal.SIGTERM, lambda *_: sys.exit())
                time.sleep(600)
            except BaseException:
                continue
    if how == "stops itself":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "many threads":
        for _ in range(20):
            threading.Thread(target=time.sleep, args=(600,)).start()
        time.sleep(600)


@pytest.mark.parametrize(
    "how", ["ignores SIGTERM", "blocks in C", "swallows everything", "stops itself", "many threads"]
)
def test_a_job_that_refuses_to_end_is_ended(make: Make, files: Files, how: str) -> None:
    evaluator = make(_refuses_to_end, job_timeout=0.5)
    (job,) = evaluator.submit([{"started": files["a"], "how": how}])
    files.wait("a")
    gather(evaluator)
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)
    assert alive([job.metadata["pid"]]) == []
