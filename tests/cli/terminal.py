"""A terminal of one's own: the command as its session leader, Ctrl-C as a key, a hang-up when it is closed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import termios
from collections.abc import Callable
from typing import Any

__all__ = ["Terminal"]


class Terminal:
    """A command on a terminal.

    Args:
        start: called as ``start(*args, **options of Popen)``.
        columns: its width.
    """

    def __init__(self, start: Callable[..., subprocess.Popen[Any]], *args: str, columns: int = 120) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, columns))
        self.seen = b""
        try:
            self.process = start(
                *args,
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        finally:
            os.close(theirs)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def over(self) -> bool:
        """Read what there is; say whether the other end is closed."""
        if self._ours >= 0 and select.select([self._ours], [], [], 0.02)[0]:
            try:
                self.seen += os.read(self._ours, 65536)
            except OSError:
                return True
        return False

    def close(self) -> None:
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1
