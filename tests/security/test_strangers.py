"""Another user of the machine attacks everything that listens while jobs run, on each backend, and nothing happens."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from evalkit.testing.backend_fixtures import BOUND, eventually
from evalkit.testing.processes import Mark

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")

ROOT = Path(__file__).resolve().parents[2]
POOL = re.findall(
    r"^<!-- file: src/evalkit_pool/backend.py -->\n```python\n(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.DOTALL | re.MULTILINE,
)[0]
IS_ROOT = os.geteuid() == 0
CLOSES = 60.0  # seconds; ray and mpiexec take some
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

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
    """A program whose jobs run until :meth:`finish`."""

    def __init__(self, folder: Path, mark: Mark, create: str, *launcher: str) -> None:
        (folder / "program.py").write_text(textwrap.dedent(_PROGRAM).format(create=create))
        (folder / "pool.py").write_text(POOL)
        self._folder = folder
        self._mark = mark
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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Program] = []

    def start(create: str, *launcher: str) -> Program:
        program = Program(tmp_path, Mark(), create, *launcher)
        started.append(program)
        program.wait_until_running()
        return program

    yield start
    for program in started:
        program.kill()


def attack(program: Program, targets: list[tuple[str, Any]], folder: Path) -> list[tuple[str, Any]]:
    """Have a stranger attack these, and the jobs end meanwhile; return the targets that let it in."""
    marker = folder / "marker"
    arguments = [str(Path(__file__).with_name("stranger.py")), str(marker), json.dumps(targets)]
    with subprocess.Popen(
        [sys.executable, "-I", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stranger:
        try:
            assert stranger.stdout is not None
            entered = [(family, address) for family, address in json.loads(stranger.stdout.readline())]
            assert program.finish() == [f"{x} DONE" for x in range(4)]
        finally:
            stranger.kill()
    assert not marker.exists()
    return entered


@pytest.mark.parametrize("method", ["serial", "thread", "process", "loky"])
def test_nothing_of_evalkit_listens(method: str, start: Any) -> None:
    if method == "loky":
        pytest.importorskip("evalkit_loky")
    program = start(f"Evaluator.create(run, {method!r})" if method == "serial" else _with_two(method))
    assert program.listeners() == []
    assert program.finish() == [f"{x} DONE" for x in range(4)]


def _with_two(method: str) -> str:
    return f'Evaluator.create(run, {method!r}, {{"num_workers": 2}})'


@pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
def test_nobody_else_can_connect_to_an_executor_of_a_plugin(start_method: str, start: Any, tmp_path: Path) -> None:
    program = start(f'Evaluator(run, __import__("pool").PoolBackend(2, start_method={start_method!r}))')
    listeners = program.listeners()
    assert [address for family, address in listeners if family == "unix" and "/evalkit-" in address]
    assert {family for family, _ in listeners} == {"unix"}
    if not IS_ROOT:
        pytest.skip("this user may connect; the tests have to run as root to be another one")
    assert attack(program, listeners, tmp_path) == []


@pytest.mark.slow
def test_strangers_cannot_disturb_ray(start: Any, tmp_path: Path) -> None:
    pytest.importorskip("evalkit_ray")
    pytest.importorskip("ray")
    program = start(_with_two("ray"))
    listeners = program.listeners()
    assert {address[0] for family, address in listeners if family != "unix"} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    ports = [one for one in listeners if one[0] != "unix"]
    entered = attack(program, listeners if IS_ROOT else ports, tmp_path)
    assert len(entered) == len(ports), "the ports are Ray's, and all that is a file is closed to others"


_WRITE = """
    import os, sys
    from ray._raylet import GcsClient

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        client = GcsClient(address=sys.argv[1])
        client.internal_kv_put(b"stranger", b"was here", True, None, 10)
    except Exception as exc:
        print("refused:", type(exc).__name__, exc)
    else:
        print("written")
"""


@pytest.fixture
def open_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home that everybody may read, as many are."""
    with tempfile.TemporaryDirectory(prefix="evalkit-home-") as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("HOME", folder)
        for name in os.environ.keys() - {"HOME"}:
            if name.startswith("RAY_"):
                monkeypatch.delenv(name)
        yield Path(folder)


@pytest.mark.slow
def test_strangers_who_speak_the_protocol_of_ray_are_refused(start: Any, open_home: Path) -> None:
    """They may read the token that Ray leaves in the home. Workers open pickles that they find in this store."""
    pytest.importorskip("evalkit_ray")
    pytest.importorskip("ray")
    if not IS_ROOT:
        pytest.skip("this user may do so; the tests have to run as root to be another one")
    program = start(_with_two("ray"))
    commands = [" ".join(process.cmdline()) for process in program.processes()]
    (address,) = {found[1] for command in commands if (found := re.search(r"--gcs-address=(\S+)", command))}
    token = open_home / ".ray" / "auth_token"
    stolen = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} if token.exists() else {}
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_WRITE), address],
        env=os.environ | stolen,
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert said.stdout.startswith("refused"), said
    assert "Timed out" not in said.stdout, "it has reached Ray"
    assert program.finish() == [f"{x} DONE" for x in range(4)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpiexec", path=PATH) is None, reason="needs mpiexec")
def test_strangers_cannot_disturb_mpi(start: Any, tmp_path: Path) -> None:
    """The ports are those of mpiexec and of the MPI library."""
    if importlib.util.find_spec("mpi4py") is None or importlib.util.find_spec("evalkit_mpi") is None:
        pytest.skip("needs evalkit-mpi")
    program = start('Evaluator.create(run, "mpicomm")', "mpiexec", "-n", "3")
    listeners = program.listeners()
    attack(program, listeners if IS_ROOT else [one for one in listeners if one[0] != "unix"], tmp_path)
