"""The nursery: a small process, with one thread and nothing of the user's, that forks the workers and buries them.

A fork of a clean process is safe and takes milliseconds, where a fork of the user's program (threads, locks, GPU
contexts) is not safe and a new interpreter takes a hundred times as long. The nursery is also what makes sure that
nothing outlives the master: it learns of the master's death, even by SIGKILL, and takes every worker with all that it
started along. If the nursery itself is killed, the kernel kills the workers (Linux).

::

    master ──(socket: SPAWN with 2 descriptors, SIGNAL)──▶ nursery ──fork──▶ worker, in a process group of its own
           ◀─(EXITED status)─────────────────────────────         ◀─SIGCHLD─
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
from typing import NoReturn

__all__ = ["MESSAGE", "SIGNAL", "SPAWN", "main"]

#: (what, number of the worker, value)
MESSAGE = struct.Struct("<iqq")
SPAWN, SIGNAL, _EXITED = range(3)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the other ways of learning of a parent's death have to do."""
    if _libc is not None:
        _libc.prctl(option, value, 0, 0, 0)


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class _Nursery:
    def __init__(self, sock: socket.socket, master: int) -> None:
        self._sock = sock
        # The end of the socket does not tell of the master's death while a fork of the master holds a copy.
        self._master = _watch(master)
        self._workers: dict[int, int] = {}  # pid -> number
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        self._wake_write = wake_write
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # What a dead worker leaves behind becomes ours, so that it can be ended too.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def serve(self) -> None:
        while True:
            readable, _, _ = select.select([self._sock.fileno(), self._wake_read, *self._master], [], [])
            if self._master and self._master[0] in readable:
                return
            if self._wake_read in readable:
                with contextlib.suppress(BlockingIOError):
                    while os.read(self._wake_read, 4096):
                        pass
                self._bury()
            if self._sock.fileno() in readable:
                try:
                    data, fds, _, _ = socket.recv_fds(self._sock, MESSAGE.size, 2)
                except ConnectionResetError:
                    return
                if not data:
                    return  # the master is gone, or done with us
                what, number, value = MESSAGE.unpack(data)
                if what == SPAWN:
                    self._spawn(number, fds)
                else:
                    self._signal(number, value)

    def _spawn(self, number: int, fds: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_worker(fds)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._workers[pid] = number

    def _become_worker(self, fds: list[int]) -> NoReturn:
        code = 1
        try:
            nursery = os.getppid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != nursery:
                os._exit(1)
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            for fd in (self._wake_read, self._wake_write, *self._master):
                os.close(fd)
            self._sock.close()
            from evalkit.backends.process.worker import main as work

            code = work(socket.socket(fileno=fds[0]), fds[1])
        except BaseException:  # noqa: BLE001 - nobody above would show it
            traceback.print_exc()
        finally:
            # Without the interpreter's own ending: threads of the user that never end would hold it up.
            os._exit(code)

    def _signal(self, number: int, signum: int) -> None:
        for pid, known in self._workers.items():
            if known == number:
                with contextlib.suppress(OSError):
                    os.killpg(pid, signum)

    def _bury(self) -> None:
        while True:
            try:
                # Left unreaped for a moment, so that the number of its process group stays its own.
                status = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if status is None:
                return
            pid = status.si_pid
            if pid in self._workers:
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            _, code = os.waitpid(pid, 0)
            number = self._workers.pop(pid, None)
            if number is not None:
                with contextlib.suppress(OSError):
                    self._sock.sendall(MESSAGE.pack(_EXITED, number, code))

    def end(self) -> None:
        """Kill all workers and what they started, and wait for them."""
        signal.set_wakeup_fd(-1)
        while True:
            for pid in self._children():
                with contextlib.suppress(OSError):
                    (os.killpg if pid in self._workers else os.kill)(pid, signal.SIGKILL)
            try:
                pid, _ = os.waitpid(-1, 0)
            except ChildProcessError:
                return
            # What it had started in sessions of their own is a child of ours now: the next round takes it.
            self._workers.pop(pid, None)

    def _children(self) -> set[int]:
        pids = set(self._workers)
        if sys.platform == "linux":
            with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
                pids |= {int(pid) for pid in file.read().split()}
        return pids


def _watch(pid: int) -> list[int]:
    """A descriptor that becomes readable when the parent ends; none where the system has no such thing."""
    if not hasattr(os, "pidfd_open"):
        return []
    try:
        watch = os.pidfd_open(pid)
    except OSError:
        return []
    if os.getppid() != pid:
        sys.exit(0)  # it ended before we could watch
    return [watch]


def main(fd: int, master: int) -> None:
    """Serve until the other end of the socket ``fd`` is closed, or the process ``master`` is gone."""
    # Loaded once, here, for all workers.
    import evalkit.backends.process.worker  # noqa: F401

    gc.collect()
    gc.freeze()
    sock = socket.socket(fileno=fd)
    nursery = _Nursery(sock, master)
    try:
        nursery.serve()
    finally:
        nursery.end()
        sock.close()
