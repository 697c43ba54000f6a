"""--deadline: the time at which a batch system ends the job, in the spellings in which people know it."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from evalkit.errors import ParametersError

__all__ = ["SLURM_END", "Deadline", "deadline_of"]

#: Set by Slurm in every job: seconds since the Unix epoch.
SLURM_END = "SLURM_JOB_END_TIME"

_DURATION = re.compile(r"\+(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_UNITS = (86400.0, 3600.0, 60.0, 1.0)  # seconds
_FLUSH = 10.0  # seconds kept back for writing and ending, beside the grace of what runs; less if time is short
_MARGIN = 60.0  # seconds before the deadline in which nothing is started, unless the user says
_FAR = 366 * 86400.0  # seconds; Slurm says this and more of jobs without a limit


@dataclass(frozen=True, slots=True)
class Deadline:
    """When everything has to be over, and what that means for what comes before.

    Attributes:
        at: seconds since the Unix epoch at which the process may be killed.
        why: where that is known from, for people.
        margin: seconds before ``at`` from which on nothing is started.
        reserve: seconds before ``at`` at which what still runs is asked to stop.
    """

    at: float
    why: str
    margin: float
    reserve: float

    def __str__(self) -> str:
        form = "%H:%M:%S" if self.at - time.time() < 12 * 3600 else "%Y-%m-%d %H:%M:%S"
        return time.strftime(form, time.localtime(self.at))

    @property
    def until_last_start(self) -> float:
        """Seconds from now in which jobs may start; at least 0.0."""
        return max(0.0, self.at - self.margin - time.time())

    @property
    def until_stop(self) -> float:
        """Seconds from now for which jobs may run; at least 0.0."""
        return max(0.0, self.at - self.reserve - time.time())


def deadline_of(
    text: str | None, margin: float | None, grace: float, environment: Mapping[str, str] = os.environ
) -> Deadline | None:
    """What ``--deadline`` and ``--margin`` say; None for no deadline.

    Args:
        text: ``17:30``, ``2026-05-01T17:30``, seconds since the Unix epoch, ``+1h30m``, ``slurm`` or ``none``; None is
            the end of the Slurm job that this runs in, if it runs in one.
        margin: seconds; None for a minute, or a quarter of the time if that is less.
        grace: seconds that jobs get between being asked to stop and being ended.

    Raises:
        ParametersError: it is none of these, has passed, or leaves no time for a job.
    """
    now = time.time()
    if text is None:
        at, why = _slurm_end(environment), f"the end of the Slurm job, {SLURM_END}; --deadline none goes on regardless"
        if at is None or at <= now:  # a shell that has outlived its job still has the variable
            if margin is not None:
                raise ParametersError("--margin is the time before a --deadline: give one")
            return None
    else:
        text = text.strip()
        if text.lower() == "none":
            return None
        at, why = _parsed(text, now, environment), f"--deadline {text}"
    left = at - now
    if left <= 0:
        raise ParametersError(f"{why}: this has passed, {-left:.0f} s ago")
    if margin is not None and margin >= left:
        raise ParametersError(f"--margin {margin:g}: there are {left:.0f} s until the deadline, so no job could start")
    reserve = min(grace + min(_FLUSH, left / 8), left / 2)
    return Deadline(at, why, max(min(_MARGIN, left / 4) if margin is None else margin, reserve), reserve)


def _parsed(text: str, now: float, environment: Mapping[str, str]) -> float:
    if text.lower() == "slurm":
        at = _slurm_end(environment)
        if at is None:
            raise ParametersError(
                f"--deadline slurm: {SLURM_END} is not set here, so this is no job of Slurm, or one without a limit"
            )
        return at
    if text.startswith("+"):
        match = _DURATION.fullmatch(text)
        if match is not None and any(match.groups()):
            return now + sum(float(part) * unit for part, unit in zip(match.groups(), _UNITS, strict=True) if part)
    elif re.fullmatch(r"\d{9,}", text):
        return float(text)
    else:
        try:
            if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text):
                return _next(text, now)
            return datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError):
            pass
    raise ParametersError(
        f"--deadline {text}: write a time (17:30, 2026-05-01T17:30), a time from now (+1h30m, +90s), slurm or none"
    )


def _next(time_of_day: str, now: float) -> float:
    hour, minute, *second = map(int, time_of_day.split(":"))
    here = datetime.fromtimestamp(now).replace(hour=hour, minute=minute, second=sum(second), microsecond=0)
    return (here if here.timestamp() > now else here + timedelta(days=1)).timestamp()


def _slurm_end(environment: Mapping[str, str]) -> float | None:
    """When the Slurm job ends; None without one, or without a limit."""
    try:
        at = float(environment.get(SLURM_END, ""))
    except ValueError:
        return None
    return at if math.isfinite(at) and 0 < at < time.time() + _FAR else None
