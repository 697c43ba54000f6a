"""What holds for every test: it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

_PATIENCE = 60.0  # seconds that processes and threads that were told to end may take


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """What runs in the background of a shell, or under nohup, ignores signals, and so would all that tests start."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def folder_for_servers() -> Iterator[Path]:
    """Not one of pytest's: every pytest that starts closes those to other users, such as the one as which PostgreSQL
    runs where the tests are root's.
    """
    with tempfile.TemporaryDirectory(prefix="evalkit-servers-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test that leaves child processes or threads that would hold up the interpreter's end."""
    processes, threads = set(_processes()), set(_threads())
    yield
    deadline = time.monotonic() + _PATIENCE
    while True:
        left = [process for process in _processes() if process not in processes]
        left_threads = [thread for thread in _threads() if thread not in threads]
        if not left and not left_threads:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    lines = [_describe(process) for process in left]
    for process in left:
        process.kill()
    pytest.fail(f"left behind: processes {lines}, threads {left_threads}")


def _processes() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        # multiprocessing's own, which lives as long as the interpreter.
        if not any("multiprocessing.resource_tracker" in part for part in _command(process))
    ]


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if not thread.daemon]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid}, which has ended"
