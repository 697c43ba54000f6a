"""What jobs print, in the shell: ``evalkit run --verbose`` and ``evalkit show JOB``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from evalkit.cli.logs import LogStream
from evalkit.joblog import JobLog

_TALK = """
import ctypes, os, sys, time
from pathlib import Path

def talk(job):
    print("hello from", job["x"])
    ctypes.CDLL(None).puts(b"in C")
    print("10 %\\r20 %\\r100 %", file=sys.stderr)
    if job["x"] == 2:
        os._exit(3)
    if "go" in job:
        while not os.path.exists(job["go"]):
            time.sleep(0.01)
    print("no line end", end="")
    return job["x"]
"""


@pytest.fixture
def talk(shell: Any) -> Any:
    (shell.folder / "talk.py").write_text(_TALK)
    return shell


def test_verbose_shows_lines_with_their_jobs(talk: Any) -> None:
    done = talk("run", "talk.py:talk", "--grid", "x=1,2", "--workers", "2", "--verbose", code=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("[0.")]
    assert [line for line in lines if line.startswith("[0.0]")] == [
        "[0.0] hello from 1",
        "[0.0] in C",
        "[0.0] 100 %",
        "[0.0] no line end",
    ]
    assert [line for line in lines if line.startswith("[0.1]")] == ["[0.1] hello from 2", "[0.1] in C", "[0.1] 100 %"]


def test_without_verbose_nothing_of_it_is_shown(talk: Any) -> None:
    done = talk("run", "talk.py:talk", "--grid", "x=1")
    assert "hello" not in done.stdout + done.stderr
    shown = talk("show", "0.0")
    assert "log:\nhello from 1\nin C\n100 %\nno line end\n" in shown.stdout


def test_verbose_shows_them_while_the_job_runs(talk: Any) -> None:
    process = talk.start("run", "talk.py:talk", "--grid", "x=1", "--grid", "go=go", "--verbose")
    lines = iter(process.stderr.readline, "")
    assert "[0.0] hello from 1\n" in lines
    assert next(lines) == "[0.0] in C\n"
    (talk.folder / "go").touch()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "[0.0] no line end\n" in err


def test_capture_off_lets_it_through(talk: Any) -> None:
    done = talk("run", "talk.py:talk", "--grid", "x=1", "--option", "capture=false")
    assert "hello from 1" in done.stdout + done.stderr
    assert "it printed nothing that was kept" in talk("show", "0.0").stdout


def test_show_a_job(talk: Any) -> None:
    talk("run", "talk.py:talk", "--grid", "x=1,2", "--search", "my.study 1.5", code=1)
    good = talk("show", "my.study 1.5.0").stdout
    for part in ("job my.study 1.5.0 in sqlite:", "DONE", "x", "output", "log:\nhello from 1\n"):
        assert part in good
    bad = talk("show", "my.study 1.5.1").stdout
    for part in ("FAILED", "CRASH", "error: WorkerDied: worker process", "exited with code 3", "log:\nhello from 2\n"):
        assert part in bad
    assert "search my.study 1.5 in" in talk("show", "my.study 1.5").stdout
    assert "job 'my.study 1.5.7'" in talk("show", "my.study 1.5.7", code=2).stderr
    assert "no search" in talk("show", "nothing.3", code=2).stderr


def test_show_a_job_with_its_resources_and_attempts(talk: Any) -> None:
    talk("run", "talk.py:talk", "--grid", "x=2", "--retries", "1", "--resource", "gpu=3", "--search", "s", code=1)
    lines = [" ".join(line.split()) for line in talk("show", "s.0").stdout.splitlines()]
    assert "resources gpu 3" in lines
    assert "attempt 1" in lines
    (ended,) = [line for line in lines if line.startswith("attempt 0 ended CRASH after ")]
    assert "WorkerDied: worker process" in ended


def test_job_memory_as_an_option(shell: Any) -> None:
    (shell.folder / "big.py").write_text("""
import time

def big(job):
    data = b"x" * (400 << 20)
    time.sleep(600)
""")
    shell("run", "big.py:big", "--grid", "x=1", "--option", "job_memory=200MB", code=1)
    assert "more than job_memory=200 MB" in shell("show", "0.0").stdout
    assert (
        "job_memory takes" in shell("run", "big.py:big", "--grid", "x=1", "--option", "job_memory=lots", code=2).stderr
    )


class _Job:
    id = "0.0"
    printed: JobLog | None = None


def test_another_attempt_begins_anew(tmp_path: Path) -> None:
    shown: list[Text] = []
    job: Any = _Job()
    stream = LogStream(shown.append)
    stream.on_progress(job)
    job.printed = JobLog(b"a long line of the first attempt\n")
    stream._running[job.id].lines(final=False)
    job.printed = JobLog(b"second\nrest")
    stream.on_done(job)
    stream.on_close()
    assert [text.plain for text in shown] == ["[0.0] second", "[0.0] rest"]
