"""What runs in a worker process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from evalkit.backends import Program, pack_exception

__all__ = ["descendants", "get_ready", "serve"]

_PARENT_INTERVAL = 0.5  # seconds between looks at whether the main process is there


def get_ready(program: Program, parent: int, connection: Connection) -> None:
    """In a worker, before its one call."""
    global _connection
    _connection = connection
    threading.Thread(target=_end_with, args=(parent,), name="evalkit-parent", daemon=True).start()
    # Ctrl-C in a terminal goes to all; what it means for the jobs is for the main process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _become_batch_work()
    program.install()


def _become_batch_work() -> None:
    """Have this worker not take the processor from who runs there when it wakes up: often the main process, which has
    just sent it a chunk and has one for the next worker. Its share of the processors is what it was.
    """
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or it is not allowed
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


_connection: Connection | None = None  # of this process, if it is a worker


def serve(run: Callable[[Any], bytes]) -> None:
    """The one call of a worker: it runs the chunks that come, until the other end is closed.

    An answer is the outcome; or nothing, and then the exception with which a chunk ended.
    """
    connection = _connection
    if connection is None:
        raise RuntimeError("a worker without a connection")
    try:
        connection.send_bytes(str(os.getpid()).encode())
        while True:
            chunk = connection.recv_bytes()
            try:
                answer = run(chunk)
            except Exception as exc:  # noqa: BLE001 - it belongs to the call
                connection.send_bytes(b"")
                answer = pack_exception(exc)
            del chunk  # it may be large, and the next may be long in coming
            connection.send_bytes(answer)
            del answer
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return
    except OSError:
        # A job has closed the descriptor. loky takes it for dead by now, and gives it a quarter of a second to be so
        # before it ends it and cannot say with which exit code; the way out through loky's own code may take longer.
        os._exit(1)


def _end_with(parent: int) -> None:
    """End this worker, and what its job has started, once the main process has gone; loky would wait for ever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_INTERVAL)
    for child in descendants(psutil.Process()):
        with contextlib.suppress(psutil.Error):
            child.kill()
    os._exit(1)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []
