"""The end of a run, and a stored search, in a few lines."""

from __future__ import annotations

from rich.text import Text

from evalkit.callbacks.table import text_of
from evalkit.callbacks.tally import one_line
from evalkit.cli.console import out
from evalkit.cli.display import duration_text
from evalkit.cli.watch import Watch
from evalkit.job import Job
from evalkit.storage.base import Storage

__all__ = ["args_text", "print_outcome", "print_summary"]

_MOST_FRONT = 10


def print_summary(watch: Watch, search_id: str, storage: Storage, skipped: int, seconds: float) -> None:
    """What a run came to."""
    now = watch.snapshot()
    rate = now.ended / seconds if seconds > 0 else 0.0
    head = Text.assemble(("search ", "bold"), (search_id, "bold"), f" in {storage.url}")
    out().print(head)
    _line("ran", f"{now.ended:,} jobs in {duration_text(seconds)} ({rate:.3g}/s)")
    if skipped:
        _line("skipped", f"{skipped:,} that were done before")
    print_outcome(watch)


def print_outcome(watch: Watch) -> None:
    """How the jobs ended, the best of them, and each kind of failure."""
    tally = watch.tally
    done = tally.ended - tally.cancelled - tally.pruned - tally.failures
    _line("done", f"{done:,}")
    if tally.pruned:
        _line("pruned", f"{tally.pruned:,}")
    if tally.cancelled:
        _line("cancelled", f"{tally.cancelled:,}")
    if watch.best_job is not None:
        job = watch.best_job
        _line("best", f"{text_of(job.objective)}  job {job.id}  {args_text(job)}", "green")
    elif tally.dimension > 1:
        _line("front", f"{tally.front_size:,} results that no other dominates", "green")
        for point in tally.front[:_MOST_FRONT]:
            _line("", str(tuple(point)))
    if tally.failures:
        _line("failed", f"{tally.failures:,}", "red")
        for kind, count in watch.kinds():
            example = watch.examples.get(kind)
            _line("", f"{kind} {count:,}" + (f"  {example}" if example else ""))


def args_text(job: Job) -> str:
    """The parameters of a job on a line."""
    return one_line(", ".join(f"{name}={text_of(value)}" for name, value in job.args.items()), 500)


def _line(label: str, text: str, style: str = "") -> None:
    out().print(Text.assemble(f"  {label:<10}", (text, style)))
