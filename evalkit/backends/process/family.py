"""Family: what workers start, and how it ends.

A worker is the subreaper of what it starts (Linux): a process whose parent ends becomes the worker's own child,
whatever session or group it has moved to, so the tree under a worker is all that its jobs have started. When the worker
ends, what is left of the tree becomes the children of the nursery. A child of the nursery that is no worker is
therefore what a dead worker has left, and is ended.

What a job starts and leaves running lives as long as its worker: a server that one job starts may be meant for the
next. An orphan that ends before its worker does stays a zombie until then, since nobody else could reap it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection

__all__ = ["Orphans", "children", "descendants"]

#: Whether the system lists the children of a process (Linux, as a rule); else all processes have to be searched.
_LISTED = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def children(pid: int) -> list[int]:
    """The processes that a process has started, or adopted, and that are not reaped."""
    found: list[int] = []
    if not _LISTED:
        import psutil

        with contextlib.suppress(psutil.Error):
            found = [child.pid for child in psutil.Process(pid).children()]
        return found
    with contextlib.suppress(OSError):  # it is gone
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


def descendants(pid: int) -> list[int]:
    """All that a process has started, and what that has started, and so on."""
    found, seen = children(pid), {pid}
    for one in found:  # grows while it is read
        if one not in seen:
            seen.add(one)
            found += children(one)
    return found


class Orphans:
    """What dead workers have left to the nursery.

    Attributes:
        due: when, on the monotonic clock, the grace of some of them is over; None if none has any.
    """

    def __init__(self) -> None:
        self._graces: dict[int, float] = {}  # pid -> until when
        self.due: float | None = None

    def spare(self, pids: Collection[int], until: float) -> None:
        """They were asked to end, and have until then."""
        self._graces |= dict.fromkeys(pids, until)
        self.due = min(self._graces.values(), default=None)

    def end(self, workers: Collection[int]) -> bool:
        """Kill all but those that have some time left, with all that they started.

        Args:
            workers: the children of the nursery that are none of them.

        Returns:
            whether there is any left, dying ones included.
        """
        now = time.monotonic()
        left = [pid for pid in children(os.getpid()) if pid not in workers]
        for pid in left:
            if self._graces.get(pid, 0.0) <= now:
                for one in (pid, *descendants(pid)):
                    with contextlib.suppress(OSError):
                        os.kill(one, signal.SIGKILL)
        self._graces = {pid: until for pid, until in self._graces.items() if until > now}
        self.due = min(self._graces.values(), default=None)
        return bool(left)
