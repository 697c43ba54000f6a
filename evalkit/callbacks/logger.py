"""LoggerCallback: one line through ``logging`` for each job that ends."""

from __future__ import annotations

import logging
from typing import Any

from evalkit.callbacks.base import Callback
from evalkit.callbacks.tally import Tally, one_line, values_of
from evalkit.job import Job, JobState
from evalkit.usercode import text_of

__all__ = ["LoggerCallback"]

_LONGEST = 200  # characters of an error or a reported reason in a line


class LoggerCallback(Callback):
    """Logs one line for each job that ends: its end, its objective, the best so far and the failures by kind.

    A line reads ``[3] job 0.2 DONE: objective 0.5, best 0.75, failures 1 (CRASH 1)``. For many objectives the size of
    the Pareto front stands in for the best. Jobs that others ended in the same search have their line too.

    Args:
        logger: where the lines go; by default the logger ``evalkit.callbacks.logger``.
        level: of the lines; a job that FAILED is logged at WARNING or at this level, whichever is higher.
        minimize: smaller objectives are better.
    """

    def __init__(
        self, logger: logging.Logger | None = None, *, level: int = logging.INFO, minimize: bool = False
    ) -> None:
        self._logger = logging.getLogger(__name__) if logger is None else logger
        self._level = level
        self._tally = Tally(minimize=minimize)

    def on_done(self, job: Job) -> None:
        tally = self._tally
        tally.add(job)
        level = max(self._level, logging.WARNING) if job.state is JobState.FAILED else self._level
        # The best and the failures in words cost more than the tally, so only for a line that is wanted.
        if self._logger.isEnabledFor(level):
            self._logger.log(
                level,
                "[%d] job %s %s, %s, %s",
                tally.ended,
                job.id,
                _end_text(job),
                tally.best_text(),
                tally.failures_text(),
            )

    def on_done_other(self, job: Job) -> None:
        self.on_done(job)


def _end_text(job: Job) -> str:
    if job.state is JobState.FAILED:
        cause = job.state.value if job.cause is None else f"{job.state.value}/{job.cause.value}"
        return cause if job.error is None else f"{cause}: {one_line(str(job.error), _LONGEST)}"
    if job.objective is not None:
        return f"{job.state.value}: objective {_objective_text(job.objective)}"
    reason = job.status.stop_message
    return job.state.value if reason is None else f"{job.state.value}: {one_line(reason, _LONGEST)}"


def _objective_text(objective: Any) -> str:
    values = values_of(objective)
    if values is None:
        return one_line(text_of(objective), _LONGEST)
    texts = [f"{value:.6g}" for value in values]
    return f"({', '.join(texts)})" if isinstance(objective, tuple) else texts[0]
