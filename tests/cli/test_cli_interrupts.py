from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import time

import pytest
from terminal import Terminal


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal."""
    with open(f"/proc/{pid}/status") as file:
        masks = dict(line.split(":") for line in file if line.startswith("Sig"))
    return bool(int(masks["SigCgt"], 16) >> (number - 1) & 1)


GRID = ("--grid", "x=0,1,2,3,4,5,6,7,8,9")


@pytest.mark.parametrize("backend", ["process", "thread", "serial"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupted_and_resumed_by_the_line_it_prints(shell, backend, number, code):
    process = shell.start("run", "work.py:polite", *GRID, "-b", backend, "-w", "1", "--output", "o.csv")
    shell.wait_for((shell.folder / "reached").exists)
    shell.wait_for((shell.folder / "o.csv").exists)
    # What ends as the signal comes may be cancelled before its end is heard.
    shell.wait_for(lambda: len((shell.folder / "o.csv").read_text().splitlines()) == 6)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "KeyboardInterrupt" not in err
    assert "evalkit/" not in err
    assert "done      5" in out
    shell.wait_for(shell.workers_gone)
    line = next(line for line in err.splitlines() if line.startswith("to resume: "))
    assert len((shell.folder / "o.csv").read_text().splitlines()) == 6  # no rows of what was cancelled

    (shell.folder / "go").touch()
    evalkit, *args = shlex.split(line.removeprefix("to resume: "))
    assert evalkit == "evalkit"
    assert "skipped   5" in shell(*args).stdout
    assert sorted(job["objective"] for job in shell.exported("0")) == [x * x for x in range(10)]
    assert len((shell.folder / "o.csv").read_text().splitlines()) == 11


def test_a_second_one_ends_at_once(shell):
    process = shell.start("run", "work.py:held", *GRID, "-w", "1", "--option", "grace=100")
    shell.wait_for((shell.folder / "reached").exists)
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "once more ends it at once" in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    shell.wait_for(shell.workers_gone)


def test_an_open_standard_input_holds_nothing_up(shell):
    process = shell.start("run", "work.py:square", "--params", "-", "-w", "1", stdin=subprocess.PIPE)
    process.stdin.write('{"x": 7}\n')
    process.stdin.flush()
    shell.wait_for(lambda: shell.ran() == [7])
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130


@pytest.mark.parametrize("backend", ["process", "thread", "serial"])
def test_ctrl_c_on_a_terminal(shell, backend):
    terminal = Terminal(shell.start, "run", "work.py:polite", *GRID, "-b", backend, "-w", "1", "--search", "s")
    try:
        shell.wait_for(lambda: terminal.over() or (shell.folder / "reached").exists())
        terminal.type(b"\x03")
        shell.wait_for(terminal.over)
        assert terminal.process.wait(300) == 130
    finally:
        terminal.close()
    assert b"Traceback" not in terminal.seen
    assert b"to resume: " in terminal.seen
    assert terminal.seen.count(b"\x1b[?25l") == terminal.seen.count(b"\x1b[?25h")  # the cursor is shown again
    shell.wait_for(shell.workers_gone, 5.0)
    (shell.folder / "go").touch()
    shell("run", "work.py:polite", *GRID, "-w", "1", "--search", "s", "--resume")
    assert sorted(job["objective"] for job in shell.exported("s")) == [x * x for x in range(10)]


@pytest.mark.parametrize("backend", ["process", "thread", "serial"])
def test_a_terminal_that_is_closed_ends_it_in_good_order(shell, backend):
    terminal = Terminal(shell.start, "run", "work.py:polite", *GRID, "-b", backend, "-w", "1", "--search", "s")
    try:
        shell.wait_for(lambda: terminal.over() or (shell.folder / "reached").exists())
    finally:
        terminal.close()
    assert terminal.process.wait(300) == 75
    shell.wait_for(shell.workers_gone, 5.0)
    states = [job["state"] for job in shell.exported("s", "--all")]
    assert states == ["DONE"] * 5 + ["CANCELLED"] * 5


def test_nohup_is_respected(shell):
    process = shell.start(
        "run", "work.py:held", *GRID, "-w", "1", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    shell.wait_for((shell.folder / "reached").exists)
    process.send_signal(signal.SIGHUP)
    (shell.folder / "go").touch()
    assert process.wait(300) == 0


@pytest.mark.parametrize("backend", ["process", "serial"])
def test_in_the_background_of_a_script_sigint_is_ignored_and_sigterm_is_not(shell, backend):
    def background() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = shell.start(
        "run", "work.py:polite", *GRID, "-b", backend, "-w", "1", "--search", "s", preexec_fn=background
    )
    shell.wait_for((shell.folder / "reached").exists)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    assert [job["state"] for job in shell.exported("s", "--all")] == ["DONE"] * 5 + ["CANCELLED"] * 5


def test_a_run_whose_time_is_up_does_not_wait_for_standard_input(shell):
    process = shell.start("run", "work.py:square", "--params", "-", "-w", "1", "--timeout", "1", stdin=subprocess.PIPE)
    assert process.wait(300) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["process", "thread", "serial"])
def test_signals_at_any_instant_lose_nothing(shell, backend):
    """Any signal, once or twice, anywhere between the start and the end; then resumed until it is done."""
    (shell.folder / "p.jsonl").write_text("".join(f'{{"x": {number}}}\n' for number in range(10, 110)))
    command = ("run", "work.py:brief", "--params", "p.jsonl", "-b", backend, "-w", "2", "--search", "s", "--resume")
    with (shell.folder / "work.py").open("a") as file:
        file.write("\ndef brief(job):\n    time.sleep(0.02)\n    return square(job)\n")
    chance = random.Random(backend)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    for _ in range(4):
        process = shell.start(*command, "--option", "grace=0.5")
        # While Python starts and loads evalkit, signals do what they do to every program.
        shell.wait_for(lambda pid=process.pid: catches(pid, signal.SIGUSR1))
        time.sleep(chance.random() * 1.5)
        for number in chance.choices(numbers, k=chance.choice([1, 2])):
            if process.poll() is None:
                process.send_signal(number)
            time.sleep(chance.random() * 0.2)
        _, err = process.communicate(timeout=300)
        assert process.returncode in (0, 75, 130), err
        assert "Traceback" not in err, err
        assert "ignored" not in err, err
        if (shell.folder / "ran.log").exists():
            shell.wait_for(shell.workers_gone, 5.0)
    shell(*command)
    jobs = shell.exported("s")
    assert sorted(job["parameters"]["x"] for job in jobs) == list(range(10, 110))
    assert all(job["state"] == "DONE" for job in jobs)


@pytest.mark.parametrize("stdout", ["closed by its reader", "closed"])
def test_a_summary_that_nobody_reads_is_no_failure(shell, stdout):
    if stdout == "closed":
        process = shell.start("run", "work.py:square", *GRID, "-w", "1", stdout=None, preexec_fn=lambda: os.close(1))
    else:
        process = shell.start("run", "work.py:square", *GRID, "-w", "1")
        process.stdout.close()
        process.stdout = None
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert len(shell.exported("0")) == 10


@pytest.mark.parametrize("backend", ["thread", "serial"])
def test_a_signal_to_a_fork_of_a_job_is_no_signal_to_the_run(shell, backend):
    (shell.folder / "forks.py").write_text(
        "import multiprocessing, os, time\n"
        "def wait(pipe):\n"
        "    os.write(pipe, b'.')\n"
        "    time.sleep(60)\n"
        "def run(job):\n"
        "    read, write = os.pipe()\n"
        "    child = multiprocessing.get_context('fork').Process(target=wait, args=(write,))\n"
        "    child.start()\n"
        "    os.read(read, 1)\n"
        "    child.terminate()\n"
        "    child.join()\n"
        "    return child.exitcode\n"
    )
    shell("run", "forks.py:run", "--grid", "x=1,2,3", "-b", backend, "--search", "s")
    assert [job["objective"] for job in shell.exported("s")] == [-15] * 3
