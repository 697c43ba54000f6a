"""Ends a local Ray when the program that started it is gone, whatever ended that.

It runs as ``python -m evalkit_ray.watch FOLDER``.

Ray's servers notice the death of their program at once, but its agents take up to a minute, and nobody removes its
folder. This process notices by the end of its standard input, and by being adopted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

__all__ = ["Watch"]

_LOOK = 1.0  # seconds between two looks at who our parent is: a fork of the program may hold our input open
_PATIENCE = 10.0  # seconds that killed processes have to go


class Watch:
    """The process that watches this program.

    Args:
        folder: the temporary folder of the Ray that this program starts, and nobody else's.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evalkit_ray.watch", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C and the end of a terminal are for the program
        )

    def end(self) -> None:
        """Have it end what is left of that Ray, and remove its folder, now; return when that is done."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b"\n")  # a fork of this program may hold it open
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2 * _PATIENCE)


def _members(folder: str) -> Iterator[psutil.Process]:
    """The processes of the Ray with this folder, and what they have started."""
    spec = importlib.util.find_spec("ray")
    package = os.path.dirname(spec.origin) if spec is not None and spec.origin is not None else folder
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            # Servers have the folder in their command line; agents and workers change theirs, and log to it.
            is_server = folder in line and package in line
            if is_server or (
                line.startswith("ray::") and any(file.path.startswith(folder) for file in process.open_files())
            ):
                yield from process.children(recursive=True)
                yield process


def _end(folder: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while (members := list(_members(folder))) and time.monotonic() < deadline:
        for process in members:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(members, 0.5)
    shutil.rmtree(folder, ignore_errors=True)


def _watch(folder: str) -> None:
    program = os.getppid()
    while os.getppid() == program:
        if select.select([sys.stdin], [], [], _LOOK)[0]:
            break
    _end(folder)


if __name__ == "__main__":
    _watch(sys.argv[1])
