"""Callback: an observer of one evaluator's events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from evalkit.job import Job

__all__ = ["Callback", "Stoppable"]


class Stoppable(Protocol):
    """What a callback may ask of its evaluator."""

    def stop(self, reason: str) -> None:
        """Take nothing more in, cancel what waits, ask what runs to stop."""


class Callback:
    """An observer of one evaluator's events; override what you need.

    The evaluator calls the methods of all its callbacks one at a time, in the order in which things happened, in a
    thread of its own (for a plain function on ``serial``, in the thread that gathers). ``gather`` returns a job only
    after the ``on_done`` of it has returned, so a slow callback slows the loop and nothing else. An exception in a
    callback is logged with the callback's name and breaks nothing. A callback may call ``submit``, ``stop`` and
    ``job.cancel()``; ``gather`` and ``close`` in a callback raise ``GatherInCallbackError``.

    Attributes:
        evaluator: the evaluator it was given to; None before.
    """

    evaluator: Stoppable | None = None

    def on_launch(self, job: Job) -> None:
        """A job was submitted."""

    def on_progress(self, job: Job) -> None:
        """A job started, or its run function reported progress; ``job.status`` says what."""

    def on_done(self, job: Job) -> None:
        """A job has ended, well or not: ``job.state`` is terminal."""

    def on_done_other(self, job: Job) -> None:
        """A job of the same search that another evaluator or worker ended was gathered."""

    def on_gather(self, jobs: Sequence[Job]) -> None:
        """``gather`` is about to return these jobs."""

    def on_close(self) -> None:
        """The evaluator is closing; nothing comes after this."""
