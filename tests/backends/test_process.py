"""What the process backend promises beyond the suite: whatever happens to the processes, nothing hangs or stays."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from process_fixtures import FakeTask, Make, alive, gather

from evalkit import Evaluator, JobCause, JobState, RunningJob
from evalkit.backends.process.link import WorkerLink
from evalkit.backends.process.outbox import Outbox
from evalkit.backends.process.worker import _Worker
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, Files, eventually, in_background

hold = functions.Plain(functions.hold)


# -- who dies, and who goes along -------------------------------------------------------------------------------------


def _with_children(job: RunningJob) -> None:
    """Start a child, and one in a session of its own; tell who they are; then go on for ever."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [subprocess.Popen(command, start_new_session=new) for new in (False, True)]
    scratch = Path(job["started"] + ".new")
    scratch.write_text(" ".join(str(pid) for pid in (os.getpid(), *(child.pid for child in children))))
    scratch.rename(job["started"])
    time.sleep(600)


def _script(text: str, path: Path, *args: str, **kwargs: Any) -> subprocess.Popen[str]:
    """Run a script in a process of its own."""
    path.write_text(text)
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parent)])} | kwargs.pop("env", {})
    return subprocess.Popen(
        [sys.executable, str(path), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs
    )


def test_workers_and_their_children_end_when_the_master_is_killed(tmp_path: Path, files: Files) -> None:
    script = f"""
import test_process
from evalkit import Evaluator
evaluator = Evaluator.create(test_process._with_children, "process", {{"num_workers": 2}})
evaluator.submit([{{"started": {files["a"]!r}}}, {{"started": {files["b"]!r}}}])
evaluator.gather("ALL")
"""
    with _script(script, tmp_path / "master.py") as master:
        pids = [int(pid) for name in ("a", "b") for pid in files.wait(name).split()]
        nursery = psutil.Process(pids[0]).ppid()
        master.kill()
        eventually(lambda: not alive([*pids, nursery]), "the end of everything the master had started")


def test_a_master_that_has_forked_takes_its_workers_along_too(tmp_path: Path, files: Files) -> None:
    script = f"""
import os, time
from evalkit import Evaluator
from evalkit.testing import functions
evaluator = Evaluator.create(functions.Plain(functions.hold), "process", {{}})
evaluator.submit([{files.holder("a")!r}])
child = os.fork()
if child == 0:
    time.sleep(600)
    os._exit(0)
print(child, flush=True)
evaluator.gather("ALL")
"""
    with _script(script, tmp_path / "master.py") as master:
        assert master.stdout is not None
        child = int(master.stdout.readline())
        pid = files.wait_started("a")
        master.kill()
        try:
            eventually(
                lambda: not alive([pid]), "the end of the worker, though a fork of the master holds its sockets", 10.0
            )
        finally:
            os.kill(child, signal.SIGKILL)


def test_close_is_quick_though_a_fork_of_the_master_lives_on(tmp_path: Path) -> None:
    script = """
import os, signal, time
from evalkit import Evaluator
from evalkit.testing import functions
evaluator = Evaluator.create(functions.echo, "process", {})
evaluator.submit([{"x": 1}])
evaluator.gather("ALL")
child = os.fork()
if child == 0:
    time.sleep(600)
    os._exit(0)
start = time.monotonic()
evaluator.close()
print(time.monotonic() - start)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
"""
    with _script(script, tmp_path / "master.py") as master:
        out, err = master.communicate(timeout=BOUND)
    assert float(out) < 5.0, err


def test_a_fork_of_the_master_that_exits_harms_no_job(tmp_path: Path, files: Files) -> None:
    script = f"""
import os, pathlib, sys, time
from evalkit import Evaluator
from evalkit.testing import functions
evaluator = Evaluator.create(functions.Plain(functions.hold), "process", {{"num_workers": 2}})
evaluator.submit([{files.holder("a")!r}, *({{"x": x}} for x in range(10))])
while not pathlib.Path({files["a.started"]!r}).exists():
    time.sleep(0.01)
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
pathlib.Path({files["a.release"]!r}).touch()
print({{job.state.value for job in evaluator.gather("ALL")}})
evaluator.close()
"""
    with _script(script, tmp_path / "master.py") as master:
        out, err = master.communicate(timeout=BOUND)
    assert out.strip() == "{'DONE'}", err


def test_the_jobs_finish_though_the_nursery_is_killed(make: Make, files: Files) -> None:
    evaluator = make(hold, num_workers=2)
    jobs = evaluator.submit([files.holder("a", x=-1), files.holder("b", x=-2), *({"x": x} for x in range(20))])
    pids = [files.wait_started(name) for name in ("a", "b")]
    os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)
    eventually(lambda: not alive(pids), "the end of the workers of a dead nursery")
    for name in ("a", "b"):
        files.release(name)
    assert gather(evaluator) == jobs
    assert [job.output for job in jobs] == [-1, -2, *range(20)]


def test_an_idle_worker_that_is_killed_is_replaced(make: Make) -> None:
    evaluator = make(functions.reveal)
    (first,) = evaluator.submit([{}])
    gather(evaluator)
    os.kill(first.output["pid"], signal.SIGKILL)
    eventually(lambda: not alive([first.output["pid"]]), "the end of the worker")
    (second,) = evaluator.submit([{}])
    gather(evaluator)
    assert second.is_success
    assert second.output["pid"] != first.output["pid"]


def test_a_job_that_is_sent_to_a_worker_that_has_gone_runs_in_another(make: Make) -> None:
    evaluator = make(functions.reveal, num_workers=1)
    (first,) = evaluator.submit([{}])
    gather(evaluator)
    worker = psutil.Process(first.output["pid"])
    nursery = worker.parent()
    assert nursery is not None
    nursery.suspend()  # nobody tells of the end of the worker
    try:
        worker.kill()
        eventually(lambda: worker.status() == psutil.STATUS_ZOMBIE, "the end of the worker")
        jobs = evaluator.submit([{}, {}, {}])
    finally:
        nursery.resume()
    assert gather(evaluator) == jobs
    assert all(job.is_success for job in jobs)
    assert worker.pid not in {job.output["pid"] for job in jobs}


def test_what_a_job_started_ends_with_it(make: Make, files: Files) -> None:
    evaluator = make(_with_children, job_timeout=1.5)
    (job,) = evaluator.submit([{"started": files["a"]}])
    gather(evaluator)
    assert job.cause is JobCause.TIMEOUT
    pids = [int(pid) for pid in files.wait("a").split()]
    eventually(lambda: not alive(pids[:2]), "the end of the worker and its child")
    evaluator.close()
    eventually(lambda: not alive(pids), "the end of the child in a session of its own")


def test_ctrl_c_in_gather_leaves_no_process(tmp_path: Path, files: Files) -> None:
    script = f"""
from evalkit import Evaluator
from evalkit.testing import functions
with Evaluator.create(functions.Plain(functions.hold), "process", {{"num_workers": 2, "grace": 0.2}}) as evaluator:
    evaluator.submit([{files.holder("a")!r}, {files.holder("b")!r}])
    evaluator.gather("ALL")
"""
    with _script(script, tmp_path / "master.py") as master:
        pids = [files.wait_started(name) for name in ("a", "b")]
        nursery = psutil.Process(pids[0]).ppid()
        master.send_signal(signal.SIGINT)
        _, err = master.communicate(timeout=BOUND)
    assert "KeyboardInterrupt" in err
    assert master.returncode != 0
    eventually(lambda: not alive([*pids, nursery]), "the end of all processes")


# -- workers that come and go -----------------------------------------------------------------------------------------


def test_workers_are_replaced_after_so_many_jobs(make: Make) -> None:
    evaluator = make(functions.reveal, num_workers=2, max_jobs_per_worker=3)
    jobs = evaluator.submit([{"x": x} for x in range(20)])
    gather(evaluator)
    assert {job.state for job in jobs} == {JobState.DONE}
    pids = [job.output["pid"] for job in jobs]
    assert max(pids.count(pid) for pid in pids) <= 3
    eventually(lambda: not alive(pids[:3]), "the end of the first worker")


def test_a_worker_for_each_job(make: Make) -> None:
    evaluator = make(functions.reveal, max_jobs_per_worker=1)
    jobs = evaluator.submit([{"x": x} for x in range(5)])
    gather(evaluator)
    assert len({job.output["pid"] for job in jobs}) == 5


def _stuck_init() -> None:
    time.sleep(600)


def _dying_init() -> None:
    os._exit(9)


def _exiting_init() -> None:
    sys.exit("not here")


@pytest.mark.parametrize(
    ("init", "options", "words"),
    [
        (functions.exploding_init, {}, "this worker cannot be had"),
        (_dying_init, {}, "exited with code 9"),
        (_exiting_init, {}, "not here"),
        (_stuck_init, {"start_timeout": 0.3}, "no worker can start"),
    ],
    ids=["raises", "crashes", "exits", "hangs"],
)
def test_workers_that_cannot_start_fail_the_jobs(make: Make, init: Any, options: dict[str, Any], words: str) -> None:
    evaluator = make(functions.echo, num_workers=2, worker_init=init, **options)
    jobs = evaluator.submit([{"x": x} for x in range(4)])
    assert gather(evaluator) == jobs
    for job in jobs:
        assert job.state is JobState.FAILED
        assert words in str(job.error)
    (later,) = evaluator.submit([{"x": 5}])
    gather(evaluator)
    assert words in str(later.error), "later jobs fail too, and at once"


def test_a_module_that_workers_cannot_import_is_named(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"module_{uuid.uuid4().hex}"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{name}.py").write_text("def run(job): return 1\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        module = __import__(name)
    sys.path_importer_cache.clear()
    evaluator = make(module.run)
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.EXCEPTION)
    assert name in str(job.error)


# -- the environment of a worker --------------------------------------------------------------------------------------


def _environment(job: RunningJob) -> dict[str, str]:
    return dict(os.environ)


def test_workers_share_the_cores(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.endswith("_NUM_THREADS"):
            monkeypatch.delenv(name)
    evaluator = make(_environment, num_workers=3)
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    share = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert job.output["OMP_NUM_THREADS"] == job.output["OPENBLAS_NUM_THREADS"] == share
    assert "OMP_NUM_THREADS" not in os.environ, "it is for the workers alone"


def test_the_users_own_settings_win(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    evaluator = make(_environment)
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    assert job.output["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in job.output, "it would overrule what the user set for all"


def test_a_setting_for_one_library_leaves_the_others_limited(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.endswith("_NUM_THREADS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    evaluator = make(_environment)
    (job,) = evaluator.submit([{}])
    gather(evaluator)
    assert job.output["MKL_NUM_THREADS"] == "5"
    assert job.output["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = """
import dataclasses
from evalkit import Evaluator

@dataclasses.dataclass
class Point:
    x: int

OFFSET = 100

def helper(point):
    return Point(point.x + OFFSET)

def run(job):
    return {"same": helper(job["point"]), "in list": [job["point"]]}

evaluator = Evaluator.create(run, "process", {"num_workers": 2})
evaluator.submit([{"point": Point(x)} for x in range(3)])
for job in evaluator.gather("ALL"):
    assert job.error is None, job.error.traceback
    assert type(job.output["same"]) is Point, type(job.output["same"])
    assert job.output == {"same": Point(job.args["point"].x + 100), "in list": [job.args["point"]]}
evaluator.close()
evaluator = Evaluator.create(lambda job: Point(job["x"]), "process")
evaluator.submit([{"x": 1}])
(job,) = evaluator.gather("ALL")
assert job.output == Point(1), job
evaluator.close()
print("fine")
"""
    with _script(script, tmp_path / "plain_script.py") as done:
        out, err = done.communicate(timeout=BOUND)
    assert (out, err) == ("fine\n", "")


def test_a_program_without_stdout(tmp_path: Path) -> None:
    script = """
import os, sys
os.close(1)
sys.stdout = None
from evalkit import Evaluator
from evalkit.testing import functions
with Evaluator.create(functions.echo, "process", {"num_workers": 2}) as evaluator:
    evaluator.submit([{"x": x} for x in range(5)])
    sys.stderr.write(str({job.state.value for job in evaluator.gather("ALL")}))
"""
    with _script(script, tmp_path / "silent.py") as done:
        _, err = done.communicate(timeout=BOUND)
    assert err == "{'DONE'}"


# -- what jobs do -----------------------------------------------------------------------------------------------------


def _leaves_others(job: RunningJob) -> int:
    """Leave a thread and a child that never end."""
    threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return child


def test_children_and_threads_that_never_end_hold_up_nobody(make: Make) -> None:
    evaluator = make(_leaves_others, num_workers=2)
    jobs = evaluator.submit([{}, {}, {}])
    gather(evaluator)
    assert [job.error for job in jobs] == [None] * 3
    in_background(evaluator.close).result(BOUND)
    eventually(lambda: not alive([job.output for job in jobs]), "the end of the children of the jobs")


def _forks(job: RunningJob) -> Any:
    """Fork, and let the child return, raise, exit or talk to the evaluator like the parent."""
    child = os.fork()
    if child == 0:
        job.record(who="child")
        job.report(0.9, "child")
        if job["how"] == "raise":
            raise ValueError("in the child")
        if job["how"] == "exit":
            sys.exit(0)
        return "child"
    os.waitpid(child, 0)
    return "parent"


def test_a_forked_child_that_returns_into_the_worker_is_not_heard(make: Make) -> None:
    evaluator = make(_forks)
    jobs = evaluator.submit([{"how": how} for how in ("return", "raise", "exit", "return")])
    gather(evaluator)
    assert [job.output for job in jobs] == ["parent"] * 4
    assert [job.records for job in jobs] == [[]] * 4


def _chats(job: RunningJob) -> str:
    """Report, record and ask from several threads at once."""

    def chat(thread: int) -> None:
        for step in range(50):
            job.record(thread=thread, step=step, weight=b"x" * 20_000)
            job.report(step / 50, f"thread {thread}")
            job.stopped()

    threads = [threading.Thread(target=chat, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "done"


def test_threads_of_a_job_may_all_report(make: Make) -> None:
    evaluator = make(_chats, num_workers=2)
    jobs = evaluator.submit([{}, {}, {}])
    gather(evaluator)
    assert [(job.error, job.output) for job in jobs] == [(None, "done")] * 3
    for job in jobs:
        steps = [[r["step"] for r in job.records if r["thread"] == thread] for thread in range(4)]
        assert steps == [list(range(50))] * 4


def _prints(job: RunningJob) -> int:
    print("x" * (2 * 2**20))
    print("y" * (2 * 2**20), file=sys.stderr)
    return 1


def test_a_job_that_prints_megabytes(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    evaluator = make(_prints, capture=False)
    evaluator.submit([{}])
    assert [job.output for job in gather(evaluator)] == [1]
    out, err = capfd.readouterr()
    assert (out.count("x"), err.count("y")) == (2 * 2**20, 2 * 2**20)


def _exits(job: RunningJob) -> None:
    sys.exit(job["status"])


@pytest.mark.parametrize("status", [0, 1, "a reason"])
def test_sys_exit_in_a_job_is_no_success(make: Make, status: Any) -> None:
    evaluator = make(_exits)
    (job,) = evaluator.submit([{"status": status}])
    gather(evaluator)
    assert (job.state, job.cause, str(job.error)) == (JobState.FAILED, JobCause.EXCEPTION, f"SystemExit: {status}")


def _deaf_to_sigterm(job: RunningJob) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    functions.hold(job).send(None)
    time.sleep(600)


def test_a_job_that_ignores_sigterm_is_killed(make: Make, files: Files) -> None:
    evaluator = make(_deaf_to_sigterm, job_timeout=0.3)
    (job,) = evaluator.submit([files.holder("a")])
    gather(evaluator)
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)
    assert not alive([files.wait_started("a")])


def test_short_jobs_behind_a_long_one_go_elsewhere(make: Make, files: Files) -> None:
    evaluator = make(hold, num_workers=2)
    evaluator.submit([{"x": x} for x in range(500)])  # short ones, so that workers take many ahead
    gather(evaluator)
    long, *short = evaluator.submit([files.holder("long"), *({"x": x} for x in range(300))])
    done = gather(evaluator, "BATCH", 300)
    assert sorted(map(id, done)) == sorted(map(id, short))
    assert long.is_running
    files.release("long")
    assert gather(evaluator) == [long]


def test_jobs_ahead_of_a_killed_one_run_elsewhere(make: Make, files: Files) -> None:
    evaluator = make(hold, num_workers=1)
    evaluator.submit([{"x": x} for x in range(500)])
    gather(evaluator)
    stuck, *others = evaluator.submit([files.holder("stuck"), *({"x": x} for x in range(100))])
    files.wait_started("stuck")
    stuck.cancel()
    gather(evaluator)
    assert stuck.state is JobState.CANCELLED
    assert [(job.state, job.output, job.attempt) for job in others] == [(JobState.DONE, x, 0) for x in range(100)]


# -- large things -----------------------------------------------------------------------------------------------------


def _double(job: RunningJob) -> Any:
    return {"same": job["array"], "double": job["array"] * 2}


def test_arrays(make: Make) -> None:
    numpy = pytest.importorskip("numpy")
    evaluator = make(_double, num_workers=2)
    array = numpy.arange(20 * 2**20 // 8, dtype=float)
    jobs = evaluator.submit(
        [{"array": array}, {"array": array[::2]}, {"array": array[:10]}, {"array": array.reshape(1024, -1).T}]
    )
    gather(evaluator)
    for job in jobs:
        assert job.error is None
        assert (job.output["double"] == 2 * job.args["array"]).all()
        assert job.output["same"].shape == job.args["array"].shape
        job.output["same"][0] = 5.0  # what comes back is the caller's own, and writable
    assert array[0] == 0.0


def _sized(job: RunningJob) -> bytes:
    return bytes(job["size"])


@pytest.mark.slow
def test_an_output_of_200_megabytes(make: Make) -> None:
    evaluator = make(_sized)
    (job,) = evaluator.submit([{"size": 200 * 2**20}])
    in_background(evaluator.gather, "ALL").result(2 * BOUND)
    assert len(job.output) == 200 * 2**20


# -- nothing piles up -------------------------------------------------------------------------------------------------


def test_descriptors_processes_and_threads_do_not_pile_up() -> None:
    me = psutil.Process()

    def cycle() -> None:
        with Evaluator.create(functions.echo, "process", {"num_workers": 2, "job_timeout": 60}) as evaluator:
            evaluator.submit([{"x": 1}])
            evaluator.gather("ALL")

    cycle()
    gc.collect()
    before, children = (me.num_fds(), threading.active_count()), me.children(recursive=True)
    for _ in range(10):
        cycle()
    gc.collect()
    assert (me.num_fds(), threading.active_count()) == before
    assert me.children(recursive=True) == children


def test_workers_that_die_do_not_pile_up_descriptors(make: Make) -> None:
    evaluator = make(functions.die, num_workers=2)
    me = psutil.Process()
    evaluator.submit([{"x": 1}])
    gather(evaluator)
    before = me.num_fds()
    evaluator.submit([{"x": 1, "how": "exit"}] * 20)
    gather(evaluator)
    eventually(lambda: me.num_fds() <= before, "as few descriptors as before")
    assert not [child for child in me.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]


def test_an_idle_evaluator_takes_no_processor_time(make: Make) -> None:
    evaluator = make(functions.echo, num_workers=2)
    evaluator.submit([{"x": x} for x in range(10)])
    gather(evaluator)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.2


# -- the tokens that decide who runs a task ---------------------------------------------------------------------------


def test_a_task_that_needs_no_token_spends_none() -> None:
    """Between two looks of the worker, the pool takes back what waited, and gives a batch with a first one granted."""
    link = WorkerLink(0)
    worker = _Worker(link.their_sock, link._token_read, Outbox(os.dup(link.fds_for_worker[2])))

    def begin() -> str | None:
        task = worker._next()
        return None if task is None else task[0]

    try:
        link.give([FakeTask("a"), FakeTask("b")])
        worker._receive()
        assert begin() == "a"
        link.finish_first()
        assert [task.id for task in link.take_back()] == ["b"]
        link.give([FakeTask("c"), FakeTask("d")])
        begun = [begin()]
        if begun == [None]:
            worker._receive()
            begun = [begin()]
        assert begun == ["c"]
        assert begin() == "d"
    finally:
        link.close()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_options_that_make_no_sense(value: Any) -> None:
    with pytest.raises(ValueError, match="max_jobs_per_worker"):
        Evaluator.create(functions.echo, "process", {"max_jobs_per_worker": value})


def test_a_worker_init_that_is_no_function() -> None:
    with pytest.raises(TypeError, match="worker_init"):
        Evaluator.create(functions.echo, "process", {"worker_init": 3})
    with pytest.raises((TypeError, ValueError), match="start_timeout"):
        Evaluator.create(functions.echo, "process", {"start_timeout": -1})


@pytest.mark.slow
def test_a_gigabyte_of_run_function_kwargs() -> None:
    numpy = pytest.importorskip("numpy")
    data = numpy.ones(2**27)
    options = {"num_workers": 2, "run_function_kwargs": {"data": data}}
    with Evaluator.create(lambda job, data: float(data[job["i"]]), "process", options) as evaluator:
        jobs = evaluator.submit([{"i": i} for i in range(20)])
        evaluator.gather("ALL")
    assert [job.output for job in jobs] == [1.0] * len(jobs), jobs[0].error
