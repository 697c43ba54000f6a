"""Jobs that have ended, as callbacks get them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from evalkit.job import ErrorInfo, Job, JobCause, JobState

Ended = Callable[..., Job]


@pytest.fixture
def ended() -> Ended:
    """Makes a job that has run and ended; numbered in the order of the calls."""
    count = 0

    def make(
        output: Any = None,
        *,
        args: dict[str, Any] | None = None,
        state: JobState = JobState.DONE,
        cause: JobCause | None = None,
        error: ErrorInfo | None = None,
        stop_message: str | None = None,
        id: str | None = None,
    ) -> Job:
        nonlocal count
        job = Job(
            f"search.{count}" if id is None else id, {"x": count} if args is None else args, number=count, created=1.0
        )
        count += 1
        job.start(2.0)
        if state is JobState.CANCELLED:
            job.move(JobState.CANCELLING, stop_message)
        job.finish(state, output, error, cause, told=4.5)
        return job

    return make


@pytest.fixture
def crashed(ended: Ended) -> Callable[[], Job]:
    """Makes a job whose worker died."""
    return lambda: ended(
        state=JobState.FAILED,
        cause=JobCause.CRASH,
        error=ErrorInfo("WorkerDied", "killed\nby SIGKILL", signal="SIGKILL"),
    )
