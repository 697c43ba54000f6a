"""How worker processes end, where loky is slow to notice."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from multiprocessing.connection import Connection

from loky.process_executor import BrokenProcessPool

__all__ = ["Watch", "death_of", "exit_of"]


def exit_of(pid: int) -> os.waitid_result | None:
    """How a child of this process has ended, if it has.

    Raises:
        ChildProcessError: loky has noticed, and nobody else can know any more.
    """
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def death_of(pid: int) -> BrokenProcessPool | None:
    """How a worker has died, in loky's words, where loky has not noticed yet: it does so by the end of a pipe, which
    a fork of the worker holds open.
    """
    try:
        exited = exit_of(pid)
    except ChildProcessError:
        return None
    if exited is None:
        return None
    if exited.si_code == os.CLD_EXITED:
        return BrokenProcessPool(f"a worker died: {{EXIT({exited.si_status})}}")
    name = next((one.name for one in signal.Signals if one == exited.si_status), f"SIG{exited.si_status}")
    return BrokenProcessPool(f"a worker died: {{{name}({-exited.si_status})}}")


class Watch:
    """Waits for what a worker says, or, where the system can tell, for its death.

    Args:
        connection: to the worker.
        pid: of the worker.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        self._pidfd: int | None = None
        with contextlib.suppress(AttributeError, OSError):  # not Linux, or it has gone and loky has noticed
            self._pidfd = os.pidfd_open(pid)
            self._poll.register(self._pidfd, select.POLLIN)

    def has_died(self) -> bool:
        """Wait; say whether it has died."""
        return any(fd == self._pidfd for fd, _ in self._poll.poll())

    def close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
