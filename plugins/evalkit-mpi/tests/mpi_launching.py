"""Programs of several ranks: starting them, and finding what they leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from evalkit.testing.processes import Mark

BOUND = 300.0  # seconds; what "does not hang" means, where many share the cores

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "mpiexec"


class Program:
    """A program under mpiexec, in a folder of its own.

    Attributes:
        folder: where it runs.
        env: its environment.
        bound: seconds that it may take.
    """

    def __init__(self, folder: Path, mark: Mark) -> None:
        self.folder = folder
        self.bound = BOUND
        # The command evalkit of this interpreter first.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | mark.environment | {"PATH": path}
        self.env.pop("PYTHONUNBUFFERED", None)  # lines stay whole

    def start(self, ranks: int, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [MPIEXEC, "-n", str(ranks), *command],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on so many ranks."""
        process = self.start(ranks, *command)
        try:
            out, err = process.communicate(timeout=self.bound)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"it hangs:\n{out}\n{err}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def script(self, ranks: int, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script on so many ranks."""
        return self.run(ranks, sys.executable, self.write("script.py", text), *arguments)

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(textwrap.dedent(text))
        return name

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def wait_for(self, name: str) -> None:
        """Wait for a file that a job creates."""
        deadline = time.monotonic() + BOUND
        while not self.exists(name):
            if time.monotonic() > deadline:
                pytest.fail(f"the file {name} does not come about")
            time.sleep(0.02)
