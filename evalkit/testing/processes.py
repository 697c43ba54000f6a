"""Processes that tests start: whether they run, and finding all that came of one."""

from __future__ import annotations

import uuid

import psutil

__all__ = ["Mark", "runs"]

_VARIABLE = "EVALKIT_TEST_MARK"


def runs(pid: int) -> bool:
    """Whether a process is there, and has not ended."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Mark:
    """An environment variable that a process inherits to all that it starts.

    Attributes:
        environment: the variable, for the environment of the first one.
    """

    def __init__(self) -> None:
        self._value = uuid.uuid4().hex
        self.environment = {_VARIABLE: self._value}

    def processes(self) -> list[psutil.Process]:
        """Those that have it."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_VARIABLE) == self._value:
                    found.append(process)
            except psutil.Error:
                continue
        return found
