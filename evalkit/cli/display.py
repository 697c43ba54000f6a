"""What a run shows while it goes: a live display on a terminal, plain lines elsewhere, nothing if asked for."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from evalkit.cli.watch import Watch

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "display_for", "duration_text"]

_REFRESH = 8  # a second
#: (age of the run, seconds between lines while it is younger): a log of days stays readable.
_PACE = ((60.0, 5.0), (3600.0, 30.0), (math.inf, 300.0))


class Display:
    """Shows nothing; the base of those that do.

    Args:
        watch: what counts.
        total: how many jobs there will be; None as long as nobody knows.
        time_left: seconds until the run is stopped; ``math.inf`` if it is not.
    """

    def __init__(self, watch: Watch, total: Callable[[], int | None], time_left: Callable[[], float]) -> None:
        self.watch = watch
        self._total = total
        self._time_left = time_left
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Show no more."""

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started

    def seconds_left(self, ended: int, rate: float) -> float | None:
        """How long the rest will take at this rate, as far as anybody can know."""
        limit, total = self._time_left(), self._total()
        if total is None or rate <= 0.0:
            return None if limit == math.inf else limit
        return min(limit, max(0, total - ended) / rate)


class PlainDisplay(Display):
    """A line now and then."""

    def __init__(
        self, watch: Watch, total: Callable[[], int | None], time_left: Callable[[], float], console: Console
    ) -> None:
        super().__init__(watch, total, time_left)
        self._console = console
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="evalkit-display", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._over.wait(next(interval for age, interval in _PACE if self.age < age)):
            self._console.print(self._line())

    def _line(self) -> str:
        now = self.watch.snapshot()
        left = self.seconds_left(now.ended, now.rate)
        total = self._total()
        parts = [
            f"{now.ended:,}" + (f" of {total:,}" if total is not None else "") + " jobs",
            f"{now.rate:.3g}/s",
            now.best,
            now.failures,
        ]
        if left is not None:
            parts.append(f"{duration_text(left)} left")
        return f"[{duration_text(self.age)}] " + ", ".join(parts)


class LiveDisplay(Display):
    """A bar with figures, redrawn in place; gone when the run is over."""

    def __init__(
        self, watch: Watch, total: Callable[[], int | None], time_left: Callable[[], float], console: Console
    ) -> None:
        super().__init__(watch, total, time_left)
        # What the user's code prints goes above the display. If standard output leads elsewhere, it has to get there.
        redirect = sys.stdout.isatty()
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=_REFRESH,
            transient=True,
            redirect_stdout=redirect,
            redirect_stderr=True,
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _render(self) -> Table:
        now = self.watch.snapshot()
        left = self.seconds_left(now.ended, now.rate)
        grid = Table.grid(padding=(0, 1), expand=False)
        total = self._total()
        bar = ProgressBar(total=total, completed=now.ended, width=24, pulse=total is None, animation_time=self.age)
        count = f"{now.ended:,}" + (f"/{total:,}" if total is not None else "")
        grid.add_row(
            bar,
            Text(count),
            Text(f"{now.rate:.3g}/s"),
            Text(now.best, style="green"),
            Text(now.failures, style="red" if self.watch.tally.failures else "dim"),
            Text(
                duration_text(self.age) + (f" < {duration_text(left)} left" if left is not None else ""), style="cyan"
            ),
        )
        return grid


def display_for(
    watch: Watch,
    total: Callable[[], int | None],
    time_left: Callable[[], float],
    console: Console,
    *,
    quiet: bool,
) -> Display:
    """What suits the place."""
    if quiet:
        return Display(watch, total, time_left)
    kind = LiveDisplay if console.is_terminal and not console.is_dumb_terminal else PlainDisplay
    return kind(watch, total, time_left, console)


def duration_text(seconds: float) -> str:
    """A duration as ``m:ss``, ``h:mm:ss`` or ``3d 04:05:06``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
