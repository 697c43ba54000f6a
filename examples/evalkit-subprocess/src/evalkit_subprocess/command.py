"""Command: a run function that makes a command line of the parameters."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

__all__ = ["Command"]


class Command:
    """The command line of a job, from a template.

    The template is split into words as a shell does, and each word filled in by itself: a value is never split, and
    there is no shell that could read it. ``{lr:.3g}`` formats as in Python, ``{{`` and ``}}`` are braces.

    Args:
        template: such as ``"./simulate --lr {lr} --depth {depth}"``.
    """

    def __init__(self, template: str) -> None:
        self._words = shlex.split(template)
        if not self._words:
            raise ValueError("Command takes the command line of a job, such as './simulate --lr {lr}', not nothing")

    def __call__(self, job: Mapping[str, Any]) -> list[str]:
        """The words of the command.

        Raises:
            ValueError: the template has a parameter that the job has not.
        """
        try:
            return [word.format_map(job) for word in self._words]
        except KeyError as exc:
            there = ", ".join(sorted(job)) or "none"
            raise ValueError(f"{self!r} has a parameter {exc} that the job has not; it has: {there}") from None

    def __repr__(self) -> str:
        return f"Command({shlex.join(self._words)!r})"
