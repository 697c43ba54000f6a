"""What another user of this machine gets from a Ray that evalkit started: nothing."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import socket
import stat
import struct

import psutil
import pytest
import ray

from evalkit import Evaluator
from evalkit.testing import functions
from evalkit.testing.backend_fixtures import BOUND, eventually, in_background

NOBODY = 65534
OK, UNIMPLEMENTED, UNAUTHENTICATED = 0, 12, 16  # statuses of gRPC
TOKEN = "RAY_AUTH_TOKEN"

#: Some of each server that Ray has on its ports.
METHODS = (
    "InternalKVGcsService/GetInternalConfig",
    "JobInfoGcsService/AddJob",
    "NodeManagerService/GetSystemConfig",
    "NodeManagerService/RequestWorkerLease",
    "ObjectManagerService/Pull",
    "ObjectManagerService/Push",
    "CoreWorkerService/NumPendingTasks",
    "CoreWorkerService/PushTask",
)


def ask(port, method, token=None):
    """Call a method of gRPC with an empty message; return the status, or what a server answers that knows no gRPC."""
    headers = {":method": "POST", ":scheme": "http", ":path": f"/ray.rpc.{method}", ":authority": "localhost"}
    headers |= {"te": "trailers", "content-type": "application/grpc"}
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    block = b"".join(b"\0" + header_text(name) + header_text(value) for name, value in headers.items())
    request = frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5))
    answer = b""
    with socket.create_connection(("127.0.0.1", port), BOUND) as sock:
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + request)
        while data := sock.recv(2**16):
            answer += data
            if status := re.search(rb"grpc-status.(\d+)", answer, re.DOTALL):
                return int(status[1])
    return answer.decode("latin-1")


def header_text(value):
    length = len(value)
    return (bytes([length]) if length < 127 else bytes([127, length - 127])) + value.encode()


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def processes():
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def listening(process):
    with contextlib.suppress(psutil.Error):
        return {found.laddr.port for found in process.net_connections() if found.status == psutil.CONN_LISTEN}
    return set()


def raylet():
    (found,) = [process for process in processes() if process.name() == "raylet"]
    return found


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def running(local_ray, tmp_path):
    """An evaluator of which two jobs run, until ``release`` is there."""
    release = tmp_path / "release"
    started = [tmp_path / f"started{x}" for x in range(2)]
    with Evaluator.create(functions.Plain(functions.hold), "ray", {"grace": 0.2, "num_workers": 2}) as evaluator:
        jobs = evaluator.submit([{"x": x, "started": str(started[x]), "release": str(release)} for x in range(2)])
        eventually(lambda: all(path.exists() for path in started), "the start of the jobs")
        yield
        release.touch()
        in_background(evaluator.gather, "ALL").result(BOUND)
        assert [job.output for job in jobs] == [0, 1], "strangers do not disturb them"


def answers(ports, token=None):
    found = {}
    for port in ports:
        with contextlib.suppress(ConnectionRefusedError):  # idle workers may end
            found[port] = [ask(port, method, token) for method in METHODS]
    return found


def test_the_ports_of_a_local_ray_are_closed_to_who_has_no_token(running):
    ports = {port for process in processes() for port in listening(process)}
    refused = {UNIMPLEMENTED, UNAUTHENTICATED}
    for token in (None, "0" * 64):
        found = answers(ports, token)
        for port, said in found.items():
            speaks_http = all(re.match(r"HTTP/1.\d 40[0-3] |<!DOCTYPE HTML>", str(text)) for text in said)
            assert set(said) <= refused or speaks_http, (port, said)
        for number, method in enumerate(METHODS):
            assert any(said[number] == UNAUTHENTICATED for said in found.values()), f"{method} is somewhere"
    gcs = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    assert ask(gcs, METHODS[0], raylet().environ()[TOKEN]) == OK, "the token is what makes the difference"


def test_garbage_and_pickles_on_the_ports_do_nothing(running, tmp_path):
    touched = tmp_path / "touched"
    message = pickle.dumps(Touch(str(touched)))
    for port in {port for process in processes() for port in listening(process)}:
        for sent in (b"\0", bytes(2**16), message, struct.pack("<Q", len(message)) + message, b"PRI * HTTP/2.0\r\n"):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0) as sock:
                sock.sendall(sent)
    assert not touched.exists()


def test_evalkit_itself_listens_on_no_port(local_ray):
    before = listening(psutil.Process())
    with Evaluator.create(functions.echo, "ray", {"grace": 0.2, "num_workers": 2}) as evaluator:
        evaluator.submit([{"x": x} for x in range(100)])
        evaluator.gather("ALL")
        assert listening(psutil.Process()) == before


def test_nobody_else_enters_the_folder_of_a_local_ray(running):
    """Ray lets everyone write to its folder, and whoever can replace its sockets has its workers."""
    folder = os.path.dirname(ray.get_runtime_context().get_temp_dir())
    status = os.stat(folder)
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (os.getuid(), 0o700)
    if os.getuid() != 0:
        return
    sockets = [found.laddr for found in raylet().net_connections("unix") if found.laddr]
    assert any(path.startswith(folder) for path in sockets)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = sum(not refused(path) for path in [folder, ray.get_runtime_context().get_temp_dir(), *sockets])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refused(path):
    try:
        if path.startswith("\0") or not path.endswith(("raylet", "plasma_store")):
            os.listdir(path)
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
    except PermissionError:
        return True
    return False


def test_the_token_is_in_the_environment_of_rays_own_processes_only(running):
    token = raylet().environ()[TOKEN]
    assert len(token) == 64
    assert token not in os.environ.values()
    assert token not in psutil.Process().environ().values()
    for process in processes():
        assert token not in " ".join(process.cmdline())
    for folder, _, names in os.walk(ray.get_runtime_context().get_temp_dir()):
        for path in [os.path.join(folder, name) for name in names]:
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    assert token.encode() not in file.read(), path
