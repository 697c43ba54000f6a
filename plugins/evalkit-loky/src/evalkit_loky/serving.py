"""What runs in a worker process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from evalkit.backends import Program, pack_exception
from evalkit_loky.connection import Kind
from evalkit_loky.worker_end import WORKER_END

__all__ = ["descendants", "get_ready", "serve"]

_PARENT_INTERVAL = 0.5  # seconds between looks at whether the main process is there


def get_ready(program: Program, parent: int, sock: socket.socket) -> None:
    """In a worker, before its one call."""
    WORKER_END.open(sock)
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


def serve(run: Callable[[Any], bytes]) -> None:
    """The one call of a worker: it runs the chunks that come, until the other end is closed."""
    try:
        WORKER_END.answer(Kind.READY, str(os.getpid()).encode())
        while True:
            chunk = WORKER_END.next_chunk()
            kind = Kind.ANSWER
            try:
                answer = run(chunk)
            except Exception as exc:  # noqa: BLE001 - it belongs to the call
                kind, answer = Kind.FAILURE, pack_exception(exc)
            del chunk  # it may be large, and the next may be long in coming
            WORKER_END.answer(kind, answer)
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
