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

import pytest
from victim import PATH, Program, with_pool, with_two

from evalkit.testing.backend_fixtures import BOUND

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")

IS_ROOT = os.geteuid() == 0


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
    program = start(f"Evaluator.create(run, {method!r})" if method == "serial" else with_two(method))
    assert program.listeners() == []
    assert program.finish() == [f"{x} DONE" for x in range(4)]


@pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
def test_nobody_else_can_connect_to_an_executor_of_a_plugin(start_method: str, start: Any, tmp_path: Path) -> None:
    program = start(with_pool(start_method))
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
    program = start(with_two("ray"))
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
    program = start(with_two("ray"))
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
