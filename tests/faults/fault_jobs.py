"""The jobs of the fault table: most are well, and one does what its parameter ``fault`` says.

They write down what happens into the folder that ``EVALKIT_FAULTS`` names: ``started`` and ``ended`` have a line
for each run, and the file ``reached-<fault>`` says that a fault is about to happen.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalkit import RunningJob

MEMORY = 250_000_000  # bytes that a job may take, where they are counted
BALLOON = 550_000_000  # bytes that the balloon takes
CHILDREN = 50
FOREVER = 1_000_000


def run(job: RunningJob) -> Any:
    """The run function. With ``once``, the fault only happens in the first run."""
    note("started", job)
    fault = job["fault"]
    output: Any = job["x"]
    if fault:
        reached = _folder() / f"reached-{fault}"
        again = reached.exists()
        if fault != "children-hang":
            reached.touch()
        if not (again and job["once"]):
            output = FAULTS[fault](job)
    note("ended", job)
    return output


def note(name: str, job: RunningJob) -> None:
    """Add a line to a file; short ones are written whole."""
    with (_folder() / name).open("a") as file:
        file.write(f"{job['x']} {os.getpid()}\n")


def _folder() -> Path:
    return Path(os.environ["EVALKIT_FAULTS"])


def die_by_sigkill(job: RunningJob) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_by_sigsegv(job: RunningJob) -> None:
    ctypes.string_at(0)


def die_by_exit(job: RunningJob) -> None:
    os._exit(3)


def leave_by_sys_exit(job: RunningJob) -> None:
    sys.exit(4)


def throw(job: RunningJob) -> None:
    raise ValueError("this one raises")


class _Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("this one does not travel")
        self.lock = threading.Lock()


def throw_unpicklable(job: RunningJob) -> None:
    raise _Unpicklable


def hang_in_python(job: RunningJob) -> None:
    while True:
        time.sleep(0.01)


def hang_in_c(job: RunningJob) -> None:
    """C code that does not let go of the interpreter, and that no signal wakes: a write into a pipe that is full.

    Who finds something to read there knows that it has begun.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pipe = _folder() / "hang-c.pipe"
    with contextlib.suppress(FileExistsError):
        os.mkfifo(pipe)
    size = 2**24
    ctypes.PyDLL(None).write(os.open(pipe, os.O_RDWR), bytes(size), size)


def hang_deaf(job: RunningJob) -> None:
    """Whatever SIGTERM reaches, here or in a thread, is ignored."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    hang_in_python(job)


def inflate(job: RunningJob) -> int:
    taken = []
    while sum(map(len, taken)) < BALLOON:
        taken.append(b"\1" * 50_000_000)
    if job["watched"]:
        hang_in_python(job)
    return job["x"]


def start_children(job: RunningJob) -> int:
    """Half of them move to a session of their own."""
    command = ["sleep", str(FOREVER)]
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"EVALKIT_FAULT": job["fault"]}
    for number in range(CHILDREN):
        child = subprocess.Popen(command, env=environment, start_new_session=bool(number % 2), **nowhere)
        child.returncode = 0  # nobody waits for it, and Python need not warn of that
    return job["x"]


def start_children_and_hang(job: RunningJob) -> None:
    start_children(job)
    (_folder() / f"reached-{job['fault']}").touch()
    hang_in_python(job)


def close_streams(job: RunningJob) -> int:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.close()
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    return job["x"]


def close_everything(job: RunningJob) -> int:
    os.closerange(0, 4096)
    return job["x"]


class _Misbehaving:
    """Does what its name says in the program that drives, and nothing in a worker."""

    def __init__(self, x: Any, rebuild: str = "") -> None:
        self.x = x
        self.rebuild = rebuild

    def __eq__(self, other: object) -> bool:
        return self.x == other

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.rebuild and _in_program():
            sys.exit(5)
        return _rebuild, (self.x, self.rebuild)


def _rebuild(x: Any, how: str) -> _Misbehaving:
    if _in_program():
        if how == "exits":
            sys.exit(5)
        while how == "hangs":
            time.sleep(0.01)
    return _Misbehaving(x, how)


def _in_program() -> bool:
    return os.getpid() == int((_folder() / "program").read_text())


def return_unstorable(job: RunningJob) -> _Misbehaving:
    return _Misbehaving(job["x"])


def return_what_exits(job: RunningJob) -> _Misbehaving:
    return _Misbehaving(job["x"], "exits")


def return_what_hangs(job: RunningJob) -> _Misbehaving:
    return _Misbehaving(job["x"], "hangs")


def nap(job: RunningJob) -> int:
    time.sleep(0.3)
    return job["x"]


def fill_disk(job: RunningJob) -> str:
    """What it returns does not fit on the disk."""
    return "x" * 1_000_000


#: The fault -> what the job does.
FAULTS: dict[str, Callable[[RunningJob], Any]] = {
    "sigkill": die_by_sigkill,
    "sigsegv": die_by_sigsegv,
    "os._exit": die_by_exit,
    "sys.exit": leave_by_sys_exit,
    "exception": throw,
    "unpicklable": throw_unpicklable,
    "hang": hang_in_python,
    "hang-c": hang_in_c,
    "hang-deaf": hang_deaf,
    "memory": inflate,
    "children": start_children,
    "children-hang": start_children_and_hang,
    "streams": close_streams,
    "descriptors": close_everything,
    "unstorable": return_unstorable,
    "rebuild-exits": return_what_exits,
    "rebuild-hangs": return_what_hangs,
    "held": nap,
    "disk": fill_disk,
    "ctrl-c": hang_in_python,
    "ctrl-c-group": hang_in_python,
    "kill-master": hang_in_python,
}
