"""The connection of this program to Ray: who made it, who uses it, and who ends it.

A program has one connection to Ray at a time, which its evaluators share. The one that finds none makes it, and the
last that goes ends it; what others have made is used and left alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from evalkit.errors import BackendError
from evalkit_ray.authentication import own_token, read_environment
from evalkit_ray.watch import Watch

__all__ = ["Session", "SessionSettings", "join"]

_CONNECT_TIMEOUT = 5.0  # seconds until somebody listens at an address
_ANSWER_TIMEOUT = 30.0  # seconds until Ray answers there
_END_TIMEOUT = 10.0  # seconds that the processes of a local Ray have to end
_LONGEST_FOLDER = 42  # characters; the paths of Ray's sockets may have 107, and it needs 65 for itself
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What a user says of the Ray that is to be used.

    Attributes:
        address: of a cluster; None for the one in ``RAY_ADDRESS``, or else a local Ray.
        num_cpus: of a local Ray; None for as many as this machine has, and no fewer than ``wanted_cpus``.
        num_gpus: of a local Ray; None for as many as are found.
        runtime_env: as ``ray.init`` takes it.
        ray_kwargs: further keyword arguments of ``ray.init``.
        wanted_cpus: by all workers at once. It is no part of what has to agree when a connection is shared.
    """

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    runtime_env: Mapping[str, Any] | None = None
    ray_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wanted_cpus: float = field(default=1.0, compare=False)

    def without_effect(self) -> list[str]:
        """What was given and only matters where a connection is made."""
        return [name for name in ("address", "num_cpus", "num_gpus", "ray_kwargs") if getattr(self, name)]


class Session:
    """One evaluator's part in the connection.

    Attributes:
        runtime_env: what tasks have to be given, since the connection was made without it.
    """

    def __init__(self, made: _Made | None, runtime_env: Mapping[str, Any] | None) -> None:
        self._made = made
        self.runtime_env = runtime_env

    @property
    def folder(self) -> str | None:
        """That of a local Ray which was started here, removed when that is gone; only this user can enter it."""
        return None if self._made is None or self._made.watch is None else self._made.watch.folder

    def leave(self) -> None:
        """Have no more use for it. May be called twice, and when Ray has ended."""
        made, self._made = self._made, None
        if made is not None:
            with _lock:
                made.users -= 1
                if not made.users:
                    _end(made)


class _Made:
    """A connection that was made here."""

    def __init__(self, settings: SessionSettings, watch: Watch | None) -> None:
        self.settings = settings
        self.watch = watch  # over a local Ray, with a folder of its own
        self.users = 1


_lock = threading.Lock()
_made: _Made | None = None


def join(settings: SessionSettings) -> Session:
    """Use the Ray that this program is connected to, or else the one that the settings name, or else a new local one.

    Raises:
        BackendError: the address does not answer, or Ray does not start.
    """
    global _made
    with _lock:
        if not ray.is_initialized():
            _made = _make(settings)
            return Session(_made, None)
        shared = _made if _made is not None and _made.users else None
        if shared is not None:
            shared.users += 1
        if shared is not None and shared.settings == settings:
            return Session(shared, None)
        unused = settings.without_effect()
        if settings.address and _is_connected_to(settings.address):
            unused.remove("address")
    if unused:
        warnings.warn(
            f"this program is already connected to Ray, and uses that: {', '.join(unused)} cannot be changed any more",
            RuntimeWarning,
            stacklevel=2,
        )
    return Session(shared, settings.runtime_env)


def _is_connected_to(address: str) -> bool:
    return address in ("auto", ray.get_runtime_context().gcs_address)


def _make(settings: SessionSettings) -> _Made:
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    arguments: dict[str, Any] = {"logging_level": logging.WARNING, **settings.ray_kwargs}
    if settings.runtime_env:
        arguments["runtime_env"] = dict(settings.runtime_env)
    if address != "local":
        read_environment()  # the token of an earlier Ray is not for this one
        _connect(address, settings, arguments)
        return _Made(settings, None)
    watch = None
    arguments["num_cpus"] = settings.num_cpus
    if settings.num_cpus is None:
        arguments["num_cpus"] = max(os.cpu_count() or 1, math.ceil(settings.wanted_cpus))
    if settings.num_gpus is not None:
        arguments["num_gpus"] = settings.num_gpus
    arguments.setdefault("include_dashboard", False)
    if "_temp_dir" not in arguments:
        # A folder of our own: it goes when we go, and no other program finds this Ray and attaches itself to it. Ray
        # lets everyone write to its folder, so that is inside one that nobody else can enter.
        folder = _new_folder()
        arguments["_temp_dir"] = os.path.join(folder, "r")
        watch = Watch(folder)
    elif not _is_private(arguments["_temp_dir"]):
        warnings.warn(
            f"Ray lets every user of this machine write to {arguments['_temp_dir']}, and so run code as you: give a "
            "_temp_dir inside a folder that only you can enter",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        with own_token(), _loopback_only() if "_node_ip_address" not in arguments else contextlib.nullcontext():
            _init("local", arguments)
    except BaseException as exc:
        read_environment()
        if watch is not None:
            watch.end()
        if not isinstance(exc, Exception):
            raise
        raise BackendError(f"a local Ray does not start: {type(exc).__name__}: {exc}") from exc
    return _Made(settings, watch)


def _connect(address: str, settings: SessionSettings, arguments: dict[str, Any]) -> None:
    origin = "" if settings.address else " (from RAY_ADDRESS)"
    for name in ("num_cpus", "num_gpus"):
        if getattr(settings, name) is not None:
            raise BackendError(
                f"{name} sizes a local Ray, and {address!r}{origin} names one that exists: leave one of them out; "
                f"what a job takes is {name}_per_task"
            )
    try:
        _probe(address)
        _init(address, arguments)
    except Exception as exc:
        raise BackendError(f"no Ray answers at {address!r}{origin}: {exc}; is it running, and reachable?") from exc


def _probe(address: str) -> None:
    """Raise unless Ray answers at this address.

    ``ray.init`` waits for minutes for one that does not, deaf to Ctrl-C, and may end the process; so a process that can
    be ended goes first.
    """
    host, separator, port = address.rpartition(":")
    if separator and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            capture_output=True,
            text=True,
            timeout=_ANSWER_TIMEOUT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"somebody listens, but did not answer as Ray does in {_ANSWER_TIMEOUT:g} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ConnectionError(lines[-1] if lines else f"the attempt ended with exit code {done.returncode}")


def _init(address: str, arguments: Mapping[str, Any]) -> None:
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **arguments)
    finally:
        # ray.init takes SIGTERM, twice: for sys.exit, and then for an abort with a stack trace. Who had a handler keeps
        # it, and where there was none, the program exits, and cleans up as it does.
        if on_main_thread and before is not None:
            signal.signal(signal.SIGTERM, before if callable(before) else signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that is started within listens on the loopback interface only, as it does by itself on a Mac.

    Elsewhere it would listen on all interfaces: it takes ``_node_ip_address="127.0.0.1"`` for this machine's other
    address. The variable ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER`` does the same, but is read when ray is imported only,
    and would spoil later connections to a real cluster.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _new_folder() -> str:
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="ek-ray-", dir=parent if len(parent) <= _LONGEST_FOLDER - 18 else "/tmp")  # noqa: S108


def _is_private(folder: str) -> bool:
    """Return whether only this user can enter one of the folders above this one."""
    above = [parent.stat() for parent in Path(folder).absolute().parents if parent.exists()]
    return any(status.st_uid == os.getuid() and not status.st_mode & 0o077 for status in above)


def _end(made: _Made) -> None:
    """With the lock: nobody uses it any more."""
    global _made
    if _made is made:
        _made = None
        if ray.is_initialized():
            processes = psutil.Process().children(recursive=True) if made.watch is not None else []
            names = ("raylet", "gcs_server")
            servers = [process for process in processes if _name(process) in names]
            ray.shutdown()
            psutil.wait_procs(servers, _END_TIMEOUT)
        read_environment()  # the token of this Ray is not for the next one
    if made.watch is not None:
        made.watch.end()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
