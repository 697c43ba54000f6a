"""Programs whose jobs run until a test lets them end, and what they listen on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil

from evalkit.testing.backend_fixtures import eventually
from evalkit.testing.processes import Mark

__all__ = ["PATH", "Program", "with_pool", "with_two"]

ROOT = Path(__file__).resolve().parents[2]
(POOL,) = re.findall(
    r"^<!-- file: src/evalkit_pool/backend.py -->\n```python\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.DOTALL | re.MULTILINE,
)
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CLOSES = 60.0  # seconds; ray and mpiexec take some

_PROGRAM = """
    import time
    from pathlib import Path

    from evalkit import Evaluator

    def run(job):
        while not Path("release").exists():
            job.report(0.5)
            Path("running").touch()
            time.sleep(0.01)
        return job["x"]

    if __name__ == "__main__":
        with {create} as evaluator:
            if evaluator.is_master:
                evaluator.submit([{{"x": x}} for x in range(4)])
                print(*sorted(f"{{job.output}} {{job.state}}" for job in evaluator.gather("ALL")), sep="\\n")
"""


class Program:
    """A program whose jobs run until :meth:`finish`.

    Args:
        folder: where it runs.
        create: the expression that makes its evaluator.
        launcher: the beginning of its command line.
    """

    def __init__(self, folder: Path, create: str, *launcher: str) -> None:
        (folder / "program.py").write_text(textwrap.dedent(_PROGRAM).format(create=create))
        (folder / "pool.py").write_text(POOL)
        self._folder = folder
        self._mark = mark = Mark()
        self._process = subprocess.Popen(
            [*launcher, sys.executable, "program.py"],
            cwd=folder,
            env=os.environ | mark.environment | {"PATH": PATH, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_running(self) -> None:
        running = self._folder / "running"
        eventually(lambda: running.exists() or self._process.poll() is not None, "the start of a job")
        assert running.exists(), self._process.communicate()

    def processes(self) -> list[psutil.Process]:
        return self._mark.processes()

    def listeners(self) -> list[tuple[str, Any]]:
        """What any of its processes listens on."""
        found: set[tuple[str, Any]] = set()
        unix = _listening_unix_sockets()
        for process in self.processes():
            try:
                for one in process.net_connections("tcp"):
                    if one.status == psutil.CONN_LISTEN:
                        found.add(("tcp6" if ":" in one.laddr.ip else "tcp", tuple(one.laddr)))
                for file in Path(f"/proc/{process.pid}/fd").iterdir():
                    name = unix.get(os.readlink(file))
                    if name is not None:
                        found.add(("unix", name))
            except (psutil.Error, OSError):  # it has ended, or closed that file
                continue
        return sorted(found)

    def finish(self) -> list[str]:
        """Let the jobs end; return what the program printed."""
        (self._folder / "release").touch()
        printed, errors = self._process.communicate(timeout=CLOSES)
        assert self._process.returncode == 0, errors
        assert "Traceback" not in errors, errors
        return printed.splitlines()

    def kill(self) -> None:
        for process in self.processes():
            process.kill()
        self._process.communicate()


def _listening_unix_sockets() -> dict[str, str]:
    """Name of the descriptor -> path, or an abstract name after ``@``."""
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *path = line.split(maxsplit=7)
        if int(flags, 16) & 0x10000:
            found[f"socket:[{inode}]"] = path[0] if path else ""
    return found


def with_two(method: str) -> str:
    """The expression that makes an evaluator with two workers."""
    return f'Evaluator.create(run, {method!r}, {{"num_workers": 2}})'


def with_pool(start_method: str) -> str:
    """The same for the plugin of CONTRIBUTING.md."""
    return f'Evaluator(run, __import__("pool").PoolBackend(2, start_method={start_method!r}))'
