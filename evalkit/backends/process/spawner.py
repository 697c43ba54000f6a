"""The master's side of the nursery: start workers, signal them, hear of their ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from evalkit.backends.process.nursery import MESSAGE, SIGNAL, SPAWN
from evalkit.errors import BackendError

__all__ = ["TERM_GRACE", "Death", "Spawner"]

#: What libraries read to decide how many threads to start.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
_BOOT = """\
import sys
sys.path[:] = {path!r}
from evalkit.backends.process.nursery import main
main({fd}, {master}, {job_memory}, {term_grace})
"""

TERM_GRACE = 1.0  # seconds between SIGTERM and SIGKILL


class Death(NamedTuple):
    """How a worker ended.

    Attributes:
        number: of the worker.
        status: its wait status.
        reason: the bytes that it took with what it started, if it was killed for that; ``DIED_OF_MEMORY`` if the
            kernel seems to have killed it for want of memory, ``DIED_UNKNOWN`` if that cannot be known; 0 otherwise.
    """

    number: int
    status: int
    reason: int


class Spawner:
    """Starts a nursery and talks to it.

    Args:
        num_workers: how many workers share the cores.
        job_memory: bytes that a worker may take, with what it started; None for no limit.

    Raises:
        BackendError: no process can be started.
    """

    def __init__(self, num_workers: int, job_memory: int | None = None) -> None:
        if not sys.executable:
            raise BackendError("sys.executable is not set, so no worker process can be started; use method='thread'")
        self._sock, theirs = socket.socketpair()
        self._rest = b""
        code = _BOOT.format(
            path=sys.path, fd=theirs.fileno(), master=os.getpid(), job_memory=job_memory, term_grace=TERM_GRACE
        )
        flags = [f"-W{option}" for option in sys.warnoptions]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _thread_limits(num_workers),
                # Ctrl-C and a hang-up of the terminal are for the master, who then ends the workers in good order.
                start_new_session=True,
            )
        except OSError as exc:
            self._sock.close()
            raise BackendError(f"no worker process can be started with {sys.executable}: {exc}") from exc
        finally:
            theirs.close()

    def fileno(self) -> int:
        """The descriptor on which to wait for :meth:`deaths`."""
        return self._sock.fileno()

    def spawn(self, number: int, fds: list[int]) -> None:
        """Start worker ``number`` with its socket, its tokens and, if what jobs print is captured, the file for it."""
        with contextlib.suppress(OSError):  # a nursery that died is noticed by deaths()
            socket.send_fds(self._sock, [MESSAGE.pack(SPAWN, number, 0, 0)], fds)

    def signal(self, number: int, signum: int) -> None:
        """Send a signal to a worker and all that it started; one that has ended is left alone."""
        with contextlib.suppress(OSError):
            self._sock.sendall(MESSAGE.pack(SIGNAL, number, signum, 0))

    def deaths(self) -> Iterator[Death]:
        """The workers that have ended since the last call, with all that they had started.

        Raises:
            EOFError: the nursery is gone, and so are its workers.
        """
        try:
            data = self._sock.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        data = self._rest + data
        whole = len(data) - len(data) % MESSAGE.size
        self._rest = data[whole:]
        for _, number, status, reason in MESSAGE.iter_unpack(data[:whole]):
            yield Death(number, status, reason)

    def close(self) -> None:
        """Have everything killed that is left, and wait for it."""
        with contextlib.suppress(OSError):
            # A fork of this process may hold a copy; this ends the connection for all.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel then kills the workers
            self._process.wait()


def _thread_limits(num_workers: int) -> dict[str, str]:
    """Each worker's share of the cores, for the libraries that would else take all of them; the user's settings win."""
    share = str(max(1, len(os.sched_getaffinity(0)) // num_workers if hasattr(os, "sched_getaffinity") else 1))
    if "OMP_NUM_THREADS" in os.environ:
        return {}  # what most of the others fall back to, so setting those would overrule the user
    return {name: share for name in _THREAD_VARIABLES if name not in os.environ}
