"""Commands as users have them."""

from __future__ import annotations

import os
import shlex
import sys
import time

import psutil
import pytest

from evalkit import Evaluator, JobCause, JobState
from evalkit_subprocess import Command

SIMULATOR = """\
echo "reading the mesh"
echo '{"progress": 0.5, "phase": "solving"}'
echo '{"record": {"step": 1, "residual": 0.25}}'
echo "warning: $1 is large" >&2
echo "{\\"objective\\": $1, \\"metadata\\": {\\"mesh\\": \\"$2\\"}}"
"""


@pytest.fixture
def simulator(tmp_path):
    path = tmp_path / "simulate"
    path.write_text(f"#!/bin/sh\n{SIMULATOR}")
    path.chmod(0o755)
    return path


def run(command, jobs=({},), **kwargs):
    with Evaluator.create(command, "subprocess", {"num_workers": 2, "grace": 0.5, **kwargs}) as evaluator:
        evaluator.submit(jobs)
        return evaluator.gather("ALL")


def test_a_simulator_gives_its_objective_and_tells_what_it_does(simulator):
    command = Command(f"{simulator} {{x:.1f}} {{mesh}}")
    jobs = run(command, [{"x": x, "mesh": "a mesh; $(rm -rf /) 'quoted' *"} for x in (1.0, 2.0)])
    assert [job.objective for job in jobs] == [1.0, 2.0]
    assert [job.records for job in jobs] == [[{"step": 1, "residual": 0.25}]] * 2
    assert jobs[0].metadata["mesh"] == "a mesh; $(rm -rf /) 'quoted' *", "a value is one word, whatever is in it"
    assert jobs[0].status.phase == "solving"
    assert jobs[0].metadata["pid"] != os.getpid()


def test_the_log_has_the_command_and_all_that_it_printed(simulator, tmp_path):
    (job,) = run(Command(f"{simulator} {{x}} fine"), [{"x": 3}], logs=tmp_path / "logs")
    lines = (tmp_path / "logs" / f"{job.id}.0.log").read_text().splitlines()
    assert lines[0] == f"$ {shlex.join([str(simulator), '3', 'fine'])}"
    assert {"reading the mesh", "warning: 3 is large"} <= set(lines)


def test_an_exit_code_fails_the_job_with_the_end_of_stderr():
    (job,) = run(Command("sh -c 'echo one >&2; echo the mesh has a hole >&2; exit 3'"))
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.CRASH)
    assert (job.error.exit_code, job.error.signal) == (3, None)
    assert "ended with exit code 3: the mesh has a hole" in job.error.message
    assert job.error.traceback == "one\nthe mesh has a hole"


def test_a_signal_fails_the_job_with_its_name():
    (job,) = run(Command("sh -c 'kill -SEGV $$'"))
    assert (job.cause, job.error.exit_code, job.error.signal) == (JobCause.CRASH, None, "SIGSEGV")


@pytest.mark.parametrize("deaf", ["", "trap '' TERM;"])
def test_what_is_out_of_time_ends_with_all_that_it_started(tmp_path, deaf):
    pids = tmp_path / "pids"
    script = f"{deaf} sleep 100 & echo $! > {pids}; echo $$ >> {pids}; wait; wait"
    (job,) = run(Command(f"sh -c {shlex.quote(script)}"), job_timeout=1.0)
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.TIMEOUT)
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline, "they are still there"
        time.sleep(0.01)


def test_a_command_that_heeds_the_request_ends_by_itself(tmp_path):
    script = f"trap 'echo 7; exit 0' TERM; touch {tmp_path}/there; while true; do sleep 0.01; done"
    command = Command(f"sh -c {shlex.quote(script)}")
    with Evaluator.create(command, "subprocess", {"grace": 30.0}) as evaluator:
        (job,) = evaluator.submit([{}])
        deadline = time.monotonic() + 30
        while not (tmp_path / "there").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.cancel()
        evaluator.gather("ALL")
    assert job.state is JobState.CANCELLED


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (Command("./no-such-simulator"), "no-such-simulator"),
        (Command("echo {lr} {depth}"), "has a parameter 'depth' that the job has not; it has: lr"),
        (Command("echo not a number"), "not JSON: 'not a number'"),
        (lambda job: "rm -rf {x}", "returns the words of a command"),
    ],
    ids=["no such program", "no such parameter", "no JSON", "no list"],
)
def test_what_cannot_be_run_or_read_says_so(command, message):
    (job,) = run(command, [{"lr": 1}])
    assert (job.state, job.cause) == (JobState.FAILED, JobCause.EXCEPTION)
    assert message in str(job.error)


def test_a_command_that_prints_nothing_has_no_output():
    (job,) = run(Command("true"))
    assert (job.state, job.output) == (JobState.DONE, None)


def test_another_form_of_output_has_a_function_that_reads_it():
    (job,) = run(Command("echo loss = 0.25"), parse=lambda line: float(line.rpartition("=")[2]))
    assert job.objective == 0.25


def test_an_empty_command_is_refused():
    with pytest.raises(ValueError, match="simulate --lr"):
        Command("  ")


def test_it_runs_from_the_shell(tmp_path, monkeypatch, simulator):
    (tmp_path / "work.py").write_text(
        f"from evalkit_subprocess import Command\nsimulate = Command('{simulator} {{x}} fine')\n"
    )
    monkeypatch.chdir(tmp_path)
    import subprocess

    line = [sys.executable, "-m", "evalkit", "run", "work.py:simulate", "--grid", "x=1,2,3", "-b", "subprocess"]
    done = subprocess.run([*line, "-w", "2"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "done      3" in done.stdout
