"""How worker processes end, where loky is slow to notice."""

from __future__ import annotations

import os
import signal

from loky.process_executor import BrokenProcessPool

__all__ = ["death_of", "exit_of"]


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
