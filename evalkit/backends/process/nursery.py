"""The nursery: a small process, with one thread and nothing of the user's, that forks the workers and buries them.

A fork of a clean process is safe and takes milliseconds, where a fork of the user's program (threads, locks, GPU
contexts) is not safe and a new interpreter takes a hundred times as long. The nursery is also what makes sure that
nothing outlives the master: it learns of the master's death, even by SIGKILL, and takes every worker with all that it
started along. It also keeps what jobs print, and the memory they take, within bounds. If the nursery itself is killed,
the kernel kills the workers (Linux).

::

    master ──(socket: SPAWN with descriptors, SIGNAL)─────▶ nursery ──fork──▶ worker, in a process group of its own
           ◀─(EXITED status)─────────────────────────────         ◀─SIGCHLD─
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from typing import NoReturn

from evalkit.backends.process.capture import Capture, Trimmer
from evalkit.backends.process.family import Orphans, children, descendants
from evalkit.backends.process.memory import MemoryWatch, OutOfMemory

__all__ = ["DIED_OF_MEMORY", "DIED_UNKNOWN", "MESSAGE", "SIGNAL", "SPAWN", "main"]

#: (what, number of the worker, value, more): the signal to send, or how a worker ended (its wait status, and why)
MESSAGE = struct.Struct("<iqqq")
SPAWN, SIGNAL, _EXITED = range(3)
#: Why a worker ended, beside its wait status: the bytes that it took, if it was killed for that; or one of these.
DIED_OF_MEMORY, DIED_UNKNOWN = -1, -2

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_LAST_WAIT = 1.0  # seconds for which the end of a worker is kept back until all that it left has ended


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the other ways of learning of a parent's death have to do."""
    if _libc is not None:
        _libc.prctl(option, value, 0, 0, 0)


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class _Nursery:
    def __init__(self, sock: socket.socket, master: int, job_memory: int | None, term_grace: float) -> None:
        self._sock = sock
        self._term_grace = term_grace
        # The end of the socket does not tell of the master's death while a fork of the master holds a copy.
        self._master = _watch(master)
        self._workers: dict[int, int] = {}  # pid -> number
        self._asked_to_end: set[int] = set()
        self._reasons: dict[int, int] = {}  # pid -> why we have killed it
        self._dead: list[tuple[int, int, int]] = []  # what is to be told, when all that they left has ended
        self._tell_at = 0.0
        self._orphans = Orphans()
        self._trimmer = Trimmer()
        self._memory = None if job_memory is None else MemoryWatch(job_memory)
        self._out_of_memory = OutOfMemory()
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
            awaited = [self._sock.fileno(), self._wake_read, *self._master]
            readable, _, _ = select.select(awaited, [], [], self._time_to_next())
            if self._master and self._master[0] in readable:
                return
            if self._wake_read in readable:
                with contextlib.suppress(BlockingIOError):
                    while os.read(self._wake_read, 4096):
                        pass
                self._bury()
            if self._sock.fileno() in readable:
                try:
                    data, fds, _, _ = socket.recv_fds(self._sock, MESSAGE.size, 4, _CLOSE_ON_EXEC)
                except ConnectionResetError:
                    return
                if not data:
                    return  # the master is gone, or done with us
                what, number, value, _ = MESSAGE.unpack(data)
                if what == SPAWN:
                    self._spawn(number, fds)
                else:
                    self._signal(number, value)
            self._look()

    # -- what is due by the clock ---------------------------------------------------------------------------------

    def _time_to_next(self) -> float | None:
        due = [self._trimmer.due] if self._trimmer else []
        if self._memory is not None and self._workers:
            due.append(self._memory.due)
        if self._orphans.due is not None:
            due.append(self._orphans.due)
        if self._dead:
            due.append(self._tell_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _look(self) -> None:
        now = time.monotonic()
        if self._trimmer and self._trimmer.due <= now:
            self._trimmer.look()
        if self._memory is not None and self._workers and self._memory.due <= now:
            for pid, size in self._memory.look(list(self._workers)).items():
                self._reasons[pid] = size
                self._signal(self._workers[pid], signal.SIGKILL)
        if self._orphans.due is not None and self._orphans.due <= now:
            self._orphans.end(self._workers)
        if self._dead and self._tell_at <= now:
            self._tell()

    # -- starts ---------------------------------------------------------------------------------------------------

    def _spawn(self, number: int, fds: list[int]) -> None:
        cell = mmap.mmap(-1, mmap.PAGESIZE) if len(fds) > 3 else None
        pid = os.fork()
        if pid == 0:
            self._become_worker(fds, cell)
        for fd in fds[:3]:
            os.close(fd)
        if cell is not None:
            self._trimmer.add(pid, fds[3], cell)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._workers[pid] = number

    def _become_worker(self, fds: list[int], cell: mmap.mmap | None) -> NoReturn:
        code = 1
        try:
            nursery = os.getppid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # see family.py
            if os.getppid() != nursery:
                os._exit(1)
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            for fd in (self._wake_read, self._wake_write, *self._master):
                os.close(fd)
            self._sock.close()
            self._trimmer.close()
            from evalkit.backends.process.outbox import Outbox
            from evalkit.backends.process.worker import main as work

            capture = None if cell is None else Capture(fds[3], cell)
            code = work(socket.socket(fileno=fds[0]), fds[1], Outbox(fds[2]), capture)
        except BaseException:  # noqa: BLE001 - nobody above would show it
            traceback.print_exc()
        finally:
            # Without the interpreter's own ending: threads of the user that never end would hold it up.
            os._exit(code)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _signal(self, number: int, signum: int) -> None:
        """Send a signal to a worker and all that it started."""
        for pid, known in self._workers.items():
            if known == number:
                family = descendants(pid)
                with contextlib.suppress(OSError):
                    os.killpg(pid, signum)
                for one in (pid, *family):
                    with contextlib.suppress(OSError):
                        if os.getpgid(one) != pid:  # it moved to another group
                            os.kill(one, signum)
                if signum == signal.SIGTERM:
                    self._asked_to_end.add(pid)
                    self._orphans.spare(family, time.monotonic() + self._term_grace)

    def _bury(self) -> None:
        while True:
            try:
                # Left unreaped for a moment, so that the number of its process group stays its own.
                status = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if status is None:
                break
            pid = status.si_pid
            # What it was asked to end with has its grace, where it becomes ours.
            if pid in self._workers and (pid not in self._asked_to_end or _libc is None):
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
            _, code = os.waitpid(pid, 0)
            number = self._workers.pop(pid, None)
            if number is not None:
                self._trimmer.remove(pid)
                if not self._dead:
                    self._tell_at = time.monotonic() + self._term_grace + _LAST_WAIT
                self._dead.append((number, code, self._reason(pid, code)))
                self._asked_to_end.discard(pid)
        if not self._orphans.end(self._workers):
            self._tell()

    def _reason(self, pid: int, code: int) -> int:
        reason = self._reasons.pop(pid, 0)
        if reason or pid in self._asked_to_end or not os.WIFSIGNALED(code) or os.WTERMSIG(code) != signal.SIGKILL:
            return reason
        return {True: DIED_OF_MEMORY, None: DIED_UNKNOWN}.get(self._out_of_memory.struck(), 0)

    def _tell(self) -> None:
        """Tell of the workers that have ended."""
        dead, self._dead = self._dead, []
        for number, code, reason in dead:
            with contextlib.suppress(OSError):
                self._sock.sendall(MESSAGE.pack(_EXITED, number, code, reason))

    def end(self) -> None:
        """Kill all workers and what they started, and wait for them."""
        signal.set_wakeup_fd(-1)
        while True:
            for pid in {*self._workers, *children(os.getpid())}:
                with contextlib.suppress(OSError):
                    (os.killpg if pid in self._workers else os.kill)(pid, signal.SIGKILL)
            try:
                pid, _ = os.waitpid(-1, 0)
                while pid:
                    # What it had started in sessions of their own is a child of ours now: the next round takes it.
                    self._workers.pop(pid, None)
                    pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return


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


def _keep_standard_descriptors(fd: int) -> int:
    """Have 0, 1 and 2 open, so that nothing of ours ever gets these numbers; return ``fd``, moved if it had one."""
    if fd <= 2:
        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            os.dup2(null, standard)
    if null > 2:
        os.close(null)
    return fd


def main(fd: int, master: int, job_memory: int | None, term_grace: float) -> None:
    """Serve until the other end of the socket ``fd`` is closed, or the process ``master`` is gone.

    Args:
        job_memory: bytes that a worker may take, with what it started; None for no limit.
        term_grace: seconds that what was told to end (SIGTERM) has for it.
    """
    # Loaded once, here, for all workers.
    import evalkit.backends.process.worker  # noqa: F401

    sock = socket.socket(fileno=_keep_standard_descriptors(fd))
    nursery = _Nursery(sock, master, job_memory, term_grace)
    gc.collect()
    gc.freeze()
    try:
        nursery.serve()
    finally:
        nursery.end()
        sock.close()
