"""``evalkit show``."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Annotated

import typer

from evalkit.cli.console import out, print_table, reported
from evalkit.cli.run import DEFAULT_STORAGE

__all__ = ["show"]


def show(
    search: Annotated[
        str,
        typer.Argument(metavar="SEARCH|JOB", help="The search to show, or the job, such as 0.12.", show_default=False),
    ],
    storage: Annotated[str, typer.Option(metavar="URL", help="The storage it is in.")] = DEFAULT_STORAGE,
    minimize: Annotated[
        bool | None, typer.Option("--minimize/--maximize", help="Which objective is the best. Default: as it was run.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-n", metavar="N", help="List the last N jobs too.", min=0)] = 0,
) -> None:
    """Show a search: what ran, how it ended, the best job, and each kind of failure.

    A job that was run again under another id is left out.

    Or show a job: its parameters, what became of it, and what it printed.
    """
    with reported():
        from collections import deque

        from evalkit.callbacks.table import text_of
        from evalkit.cli.records import is_settled, iterate, job_of, open_existing, superseded
        from evalkit.cli.session import RunInfo
        from evalkit.cli.show_job import find_job, show_job
        from evalkit.cli.summary import args_text, print_outcome
        from evalkit.cli.watch import Watch
        from evalkit.job import Job, JobState

        with closing(open_existing(storage)) as opened:
            job_record = None if search in opened.list_searches() else find_job(opened, search)
            if job_record is not None:
                show_job(opened, job_record)
                return
            record = opened.load_search(search)
            info = RunInfo.of(record)
            if minimize is None:
                minimize = info is not None and info.minimize
            watch = Watch(minimize=minimize)
            gone = superseded(opened, record)
            last: deque[Job] = deque(maxlen=jobs)
            live = 0
            for one in iterate(opened, search):
                if one.id in gone:
                    continue
                job = job_of(one)
                last.append(job)
                if is_settled(one) or one.state is JobState.CANCELLED:
                    watch.on_done(job)
                else:
                    live += 1
            console = out()
            console.print(f"search {search} in {opened.url}")
        console.print(f"  created    {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))}")
        if info is not None:
            console.print(f"  target     {info.target}")
            ended = (
                "running, or killed"
                if info.ended is None
                else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.ended))
            )
            console.print(f"  ended      {ended}")
        if live:
            console.print(f"  not ended  {live:,}")
        print_outcome(watch)
        if last:
            rows = [
                [job.id, job.state.value, text_of(job.objective), str(job.error or ""), args_text(job)] for job in last
            ]
            print_table(["job", "state", "objective", "error", "parameters"], rows)
