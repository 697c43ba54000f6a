from __future__ import annotations

import shlex
import signal
import time
from datetime import datetime, timedelta

import pytest

from evalkit.cli.deadline import SLURM_END, deadline_of
from evalkit.errors import ParametersError

GRID = ("--grid", "x=0,1,2,3,4,5,6,7,8,9")


def at(text: str | None, margin: float | None = None, **environment: str) -> float:
    """Seconds from now."""
    deadline = deadline_of(text, margin, 2.0, environment)
    assert deadline is not None
    return deadline.at - time.time()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("+90s", 90), ("+30m", 1800), ("+1h30m", 5400), ("+2d", 172800), ("+1d2h3m4.5s", 93784.5)],
)
def test_a_time_from_now(text: str, seconds: float) -> None:
    assert at(text) == pytest.approx(seconds, abs=5)


def test_a_time_of_day_is_the_next_one() -> None:
    soon = datetime.now() + timedelta(hours=1)
    assert at(f"{soon:%H:%M:%S}") == pytest.approx(3600, abs=5)
    ago = datetime.now() - timedelta(hours=1)
    assert at(f"{ago:%H:%M:%S}") == pytest.approx(23 * 3600, abs=3700)  # a day may have 23 or 25 hours


def test_a_date_with_and_without_a_time_zone_and_in_seconds() -> None:
    then = datetime.now() + timedelta(days=3)
    seconds = then.timestamp() - time.time()
    assert at(then.isoformat()) == pytest.approx(seconds, abs=5)
    assert at(then.astimezone().isoformat()) == pytest.approx(seconds, abs=5)
    assert at(f"{then:%Y-%m-%d %H:%M:%S}") == pytest.approx(seconds, abs=5)
    assert at(str(int(then.timestamp()))) == pytest.approx(seconds, abs=5)


def test_slurm_is_asked_for_or_found() -> None:
    end = str(int(time.time() + 3600))
    assert at("slurm", **{SLURM_END: end}) == pytest.approx(3600, abs=5)
    assert at(None, **{SLURM_END: end}) == pytest.approx(3600, abs=5)
    assert deadline_of("none", None, 2.0, {SLURM_END: end}) is None
    assert deadline_of(None, None, 2.0, {}) is None
    # A job without a limit, and a shell that has outlived its job.
    for other in ("0", "4294967294000", "soon", str(int(time.time() - 60))):
        assert deadline_of(None, None, 2.0, {SLURM_END: other}) is None


@pytest.mark.parametrize(
    ("text", "margin", "message"),
    [
        ("tomorrow", None, "write a time"),
        ("+", None, "write a time"),
        ("+5", None, "write a time"),
        ("25:00", None, "write a time"),
        ("2001-01-01T00:00", None, "has passed"),
        ("1000000000", None, "has passed"),
        ("slurm", None, SLURM_END),
        ("+10s", 20.0, "no job could start"),
        (None, 20.0, "--deadline"),
    ],
)
def test_what_cannot_be_kept_is_refused(text: str | None, margin: float | None, message: str) -> None:
    with pytest.raises(ParametersError, match=message):
        deadline_of(text, margin, 2.0, {})


def test_there_is_time_to_end_what_runs_and_to_write() -> None:
    deadline = deadline_of("+1h", None, 5.0, {})
    assert deadline is not None
    assert (deadline.margin, deadline.reserve) == (60.0, 15.0)
    short = deadline_of("+8s", None, 5.0, {})
    assert short is not None
    assert 0 < short.reserve <= short.margin < 8
    assert 0 < short.until_last_start < 8


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["process", "serial"])
def test_before_the_deadline_nothing_starts_and_what_runs_ends(shell, backend):
    """Job 5 is held up until nothing starts any more, and then ends well."""
    command = ("run", "work.py:held", *GRID, "-b", backend, "-w", "1", "--search", "s")
    process = shell.start(*command, "--deadline", "+40s", "--margin", "34")
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "nothing more is started" in line:
            break
    (shell.folder / "go").touch()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, (seen, err)
    assert any("deadline " in line and "--deadline +40s" in line for line in seen)
    assert shell.ran() == [0, 1, 2, 3, 4, 5]
    assert "done      6" in out
    assert "cancelled 4" in out
    # What is printed goes on where this ended, and runs exactly the rest.
    line = next(line for line in err.splitlines() if line.startswith("to resume: "))
    shell(*shlex.split(line.removeprefix("to resume: evalkit ")))
    assert shell.ran() == list(range(10))
    assert sorted(job["objective"] for job in shell.exported("s")) == [x * x for x in range(10)]


@pytest.mark.slow
def test_what_runs_into_the_deadline_is_ended_before_it(shell):
    deadline = int(time.time()) + 12
    shell("run", "work.py:held", *GRID, "-w", "1", "--search", "s", "--deadline", str(deadline), code=75)
    assert time.time() < deadline
    shell.wait_for(shell.workers_gone)
    states = [job["state"] for job in shell.exported("s")]
    assert states.count("DONE") == 5
    (shell.folder / "go").touch()
    shell("run", "work.py:held", *GRID, "-w", "1", "--search", "s", "--resume")
    assert shell.ran() == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]


def test_slurm_tells_the_deadline_and_is_named(shell):
    shell.environment[SLURM_END] = str(int(time.time() + 3600))
    assert SLURM_END in shell("run", "work.py:square", "--grid", "x=1,2", "-w", "1").stderr
    assert SLURM_END not in shell("run", "work.py:square", "--grid", "x=1,2", "-w", "1", "--deadline", "none").stderr


@pytest.mark.slow
def test_a_job_that_crashes_near_the_deadline_is_left_to_the_resume(shell):
    """It has a retry left, but nothing starts any more: neither has it failed."""
    (shell.folder / "crash.py").write_text(
        "import os, time\n"
        "def run(job):\n"
        "    open('reached', 'w').close()\n"
        "    while not os.path.exists('go'):\n        time.sleep(0.01)\n"
        "    if not os.path.exists('well'):\n        os._exit(3)\n"
        "    return 1\n"
    )
    command = ("run", "crash.py:run", "--grid", "x=1", "-w", "1", "--search", "s", "--retries", "1")
    process = shell.start(*command, "--deadline", "+40s", "--margin", "34")
    for line in process.stderr:
        if "nothing more is started" in line:
            break
    (shell.folder / "go").touch()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert [job["state"] for job in shell.exported("s", "--all")] == ["CANCELLED"]
    (shell.folder / "well").touch()
    shell(*command, "--resume")
    assert [job["objective"] for job in shell.exported("s")] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_what_a_batch_system_sends_says_resume_me(shell, number):
    process = shell.start("run", "work.py:polite", *GRID, "-w", "1", "--search", "s", "--output", "o.csv")
    shell.wait_for((shell.folder / "reached").exists)
    # What ends as the signal comes may be cancelled before its end is heard.
    shell.wait_for((shell.folder / "o.csv").exists)
    shell.wait_for(lambda: len((shell.folder / "o.csv").read_text().splitlines()) == 6)
    process.send_signal(number)
    process.send_signal(number)  # timeout and mpiexec send it to the process and to its group: that is one request
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert number.name in err
    assert "done      5" in out
    shell.wait_for(shell.workers_gone)
