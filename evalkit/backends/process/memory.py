"""Memory of jobs: how much a worker takes with all that it started, and whether the kernel killed it for want of it.

The nursery looks, not the master: the interpreter of the master may be busy for seconds when every moment counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from evalkit.backends.process.family import descendants

__all__ = ["MemoryWatch", "OutOfMemory", "parse_bytes", "show_bytes"]

_INTERVAL = 0.05  # seconds between two looks
_SHARE = 10  # looking takes at most one tenth of the time
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("I", 1024), ("IB", 1024))
}


def parse_bytes(name: str, value: Any) -> int:
    """Read a number of bytes: an int, or a string such as ``"2GB"`` (10^9 each) or ``"512 MiB"`` (2^20 each).

    Raises:
        ValueError: it is none of these, or not positive; says so with ``name``.
    """
    number = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        number = float(match[1]) * _UNITS.get(match[2].upper(), -1)
    if not (number >= 1 and math.isfinite(number)):
        raise ValueError(
            f"{name} takes a positive number of bytes, or a string such as '2GB' or '512MiB', not {value!r}"
        )
    return int(number)


def show_bytes(number: int) -> str:
    """A number of bytes for people: ``1.5 GB``."""
    amount, unit = float(number), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"


class MemoryWatch:
    """Compares what workers take with what a job may take.

    Args:
        limit: bytes that a worker may take, with all that it started.

    Attributes:
        due: when to :meth:`look` next, on the monotonic clock.
    """

    def __init__(self, limit: int) -> None:
        import psutil  # here, since most nurseries do without

        self._psutil = psutil
        self._limit = limit
        self.due = 0.0

    def look(self, workers: list[int]) -> dict[int, int]:
        """The workers that take more than they may: pid -> bytes. They are stopped (SIGSTOP): kill them."""
        start = time.monotonic()
        over = {pid: size for pid in workers if (size := self._excess(pid))}
        end = time.monotonic()
        self.due = end + max(_INTERVAL, _SHARE * (end - start))
        return over

    def _excess(self, pid: int) -> int:
        """How much it takes, if that is too much; 0 if not."""
        if self._resident(pid) <= self._limit or self._proportional(pid) <= self._limit:
            return 0
        # It must not go on to its next job while it is being blamed for this one.
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
        size = self._proportional(pid)
        if size > self._limit:
            return size
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGCONT)
        return 0

    def _resident(self, pid: int) -> int:
        """Quick, and too much where processes share memory."""
        total = 0
        for one in (pid, *descendants(pid)):
            with contextlib.suppress(self._psutil.Error):
                total += self._psutil.Process(one).memory_info().rss
        return total

    def _proportional(self, pid: int) -> int:
        """Slow, and exact: what processes share is counted once."""
        total = 0
        for one in (pid, *descendants(pid)):
            with contextlib.suppress(self._psutil.Error):
                process = self._psutil.Process(one)
                try:
                    total += process.memory_full_info().pss
                except (AttributeError, self._psutil.AccessDenied):  # not Linux, or not ours to look into
                    total += process.memory_info().rss
        return total


class OutOfMemory:
    """The kernel's own killing for want of memory, as far as this machine tells of it: a counter, best that of our
    control group, else that of the machine.
    """

    def __init__(self) -> None:
        self._path = next((path for path in _counters() if _read_count(path) is not None), None)
        self._last = self._count()

    def struck(self) -> bool | None:
        """Whether it has killed anything since this was last asked; None if nobody can know."""
        last, self._last = self._last, self._count()
        return None if last is None or self._last is None else self._last > last

    def _count(self) -> int | None:
        return None if self._path is None else _read_count(self._path)


def _counters() -> list[Path]:
    """The files that may hold the counter, the most exact first."""
    root = Path("/sys/fs/cgroup")
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            group = group.strip("/")
            if "memory" in controllers.split(","):
                found += [root / "memory" / group / "memory.oom_control", root / "memory" / "memory.oom_control"]
            elif not controllers:
                found += [root / group / "memory.events", root / "memory.events"]
    return [*found, Path("/proc/vmstat")]


def _read_count(path: Path) -> int | None:
    try:
        match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None
