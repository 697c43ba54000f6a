from __future__ import annotations

import shlex
import signal
import subprocess

import pytest

GRID = ("--grid", "x=0,1,2,3,4,5,6,7,8,9")


@pytest.mark.parametrize("backend", ["process", "thread", "serial"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_interrupted_and_resumed_by_the_line_it_prints(shell, backend, number, code):
    process = shell.start("run", "work.py:polite", *GRID, "-b", backend, "-w", "1", "--output", "o.csv")
    shell.wait_for((shell.folder / "reached").exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
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
    assert process.wait(10) == 130
    shell.wait_for(shell.workers_gone)


def test_an_open_standard_input_holds_nothing_up(shell):
    process = shell.start("run", "work.py:square", "--params", "-", "-w", "1", stdin=subprocess.PIPE)
    process.stdin.write('{"x": 7}\n')
    process.stdin.flush()
    shell.wait_for(lambda: shell.ran() == [7])
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
