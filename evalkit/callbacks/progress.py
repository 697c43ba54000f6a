"""TqdmCallback: a progress bar in a terminal or a notebook."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from evalkit.callbacks.base import Callback
from evalkit.callbacks.tally import Tally
from evalkit.job import Job

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["TqdmCallback"]


class TqdmCallback(Callback):
    """A tqdm bar over the jobs, with the best objective and the number of failures beside it.

    The bar appears at the first job, in the form that suits the place (a widget in a notebook, text on stderr
    elsewhere), and is closed when the evaluator is. For many objectives the size of the Pareto front stands in for
    the best.

    Args:
        total: how many jobs there will be; None lets the total grow with each job that is submitted.
        description: words in front of the bar.
        minimize: smaller objectives are better.

    Raises:
        ValueError: ``total`` is negative.
    """

    def __init__(self, total: int | None = None, description: str | None = None, *, minimize: bool = False) -> None:
        if total is not None and total < 0:
            raise ValueError(f"total is a number of jobs, 0 or more, or None to count them as they come; got {total}")
        self._total = total
        self._description = description
        self._tally = Tally(minimize=minimize)
        self._bar: tqdm[Any] | None = None
        self._launched = 0
        self._shown = 0

    def on_launch(self, job: Job) -> None:
        self._launched += 1
        self._grow()

    def on_done(self, job: Job) -> None:
        self._tally.add(job)
        bar = self._opened()
        bar.set_postfix_str(f"{self._tally.best_text()}, failures {self._tally.failures}", refresh=False)
        bar.update(1)

    def on_done_other(self, job: Job) -> None:
        # It was launched elsewhere, so nothing counted it yet.
        self._launched += 1
        self._grow()
        self.on_done(job)

    def on_close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()
        self._launched = self._shown = 0

    def _opened(self) -> tqdm[Any]:
        if self._bar is None:
            total = self._launched if self._total is None else self._total
            self._shown = total
            # Each update may draw, at most every mininterval: without it tqdm would guess how many to skip, and need
            # a thread to correct the guess.
            self._bar = _bar_class()(total=total, desc=self._description, miniters=1, unit="job", dynamic_ncols=True)
        return self._bar

    def _grow(self) -> None:
        bar = self._opened()
        if self._total is not None or bar.total == self._launched:
            return
        bar.total = self._launched
        # Drawing at each of a million submits would cost more than the submits; off by one in a hundred is not seen.
        if self._launched * 100 >= self._shown * 101:
            self._shown = self._launched
            container = getattr(bar, "container", None)
            if container is not None:  # the notebook's widget has a total of its own
                container.children[1].max = self._launched
            bar.refresh()


def _bar_class() -> type[tqdm[Any]]:
    with warnings.catch_warnings():
        # That the notebook's bar is experimental, or falls back to text because ipywidgets is missing, is no news to
        # the user and no reason to fail where warnings are errors.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]  # not subscriptable when it runs
        monitor_interval = 0  # no monitor thread: nothing needs it here, and it would outlive the bar

    return Bar
