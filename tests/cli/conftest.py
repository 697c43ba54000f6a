"""Running the real command, and waiting for what it does."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-W", "error", "-m", "evalkit"]

#: What the tests run. A job says that it runs by adding its x and its process to ran.log.
TARGET = '''
import math, os, time
from pathlib import Path

def square(job):
    with open("ran.log", "a") as file:
        file.write(f"{job['x']} {os.getpid()}\\n")
    return job["x"] ** 2

def troubled(job):
    x = job["x"]
    if x == 1:
        raise ValueError("no ones")
    if x == 2:
        os._exit(3)
    return {3: "F_three", 4: math.nan}.get(x, x)

def held(job):
    """Job 5 does not end before there is a file go, however it is asked."""
    value = square(job)
    if job["x"] == 5:
        Path("reached").touch()
        while not os.path.exists("go"):
            time.sleep(0.01)
    return value

def polite(job):
    """As held, but job 5 returns when it is asked to stop."""
    value = square(job)
    if job["x"] == 5:
        Path("reached").touch()
        while not os.path.exists("go") and not job.stopped():
            time.sleep(0.01)
    return value

def multiply(x, y=2):
    return x * y
'''


class Shell:
    """The command in a folder of its own, as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")},
            "PYTHONPATH": str(REPOSITORY),
            "TERM": "xterm",
        }

    def start(self, *args: str, **kwargs: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process: subprocess.Popen[str] = subprocess.Popen(
            [*COMMAND, *args], cwd=self.folder, env=self.environment, text=True, **{**pipes, **kwargs}
        )
        self.started.append(process)
        return process

    def __call__(self, *args: str, code: int = 0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **({} if stdin is None else {"stdin": subprocess.PIPE}))
        out, err = process.communicate(stdin, timeout=300)
        assert process.returncode == code, (process.returncode, out, err)
        assert "evalkit/" not in err, err  # no frame of ours, whatever happens
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    @staticmethod
    def wait_for(condition: Callable[[], Any], seconds: float = 180.0) -> Any:
        """What ``condition`` gives once that is true."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.01)
        return value

    def exported(self, search: str, *args: str) -> list[dict[str, Any]]:
        self("export", search, "--output", "exported.jsonl", *args)
        return [json.loads(line) for line in (self.folder / "exported.jsonl").read_text().splitlines()]

    def ran(self) -> list[int]:
        """The x of the jobs that started, in order."""
        log = self.folder / "ran.log"
        return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []

    def workers_gone(self) -> bool:
        pids = {int(line.split()[1]) for line in (self.folder / "ran.log").read_text().splitlines()}
        return not any(psutil.pid_exists(pid) for pid in pids)

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (tmp_path / "work.py").write_text(TARGET)
    shell = Shell(tmp_path)
    yield shell
    shell.end()


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """The command in this process: quick, for what is about words."""
    from evalkit.cli.app import create_app

    (tmp_path / "work.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    logger = logging.getLogger("evalkit")
    handlers, propagate = list(logger.handlers), logger.propagate

    def call(*args: str) -> Result:
        return CliRunner().invoke(create_app(), list(args))

    yield call
    logger.handlers[:], logger.propagate = handlers, propagate
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
