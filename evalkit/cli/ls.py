"""``evalkit ls``."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Annotated

import typer

from evalkit.cli.console import print_table, reported
from evalkit.cli.run import DEFAULT_STORAGE

__all__ = ["ls"]


def ls(
    storage: Annotated[str, typer.Option(metavar="URL", help="The storage to look into.")] = DEFAULT_STORAGE,
) -> None:
    """List the searches of a storage, oldest first, and how many of their jobs are in which state."""
    with reported():
        from evalkit.cli.records import open_existing, superseded
        from evalkit.cli.session import RunInfo
        from evalkit.job import JobState

        shown = [state for state in JobState if state not in (JobState.SUSPENDED, JobState.UNKNOWN)]
        rows = []
        with closing(open_existing(storage)) as opened:
            for search_id in opened.list_searches():
                search = opened.load_search(search_id)
                counts = opened.count_jobs(search_id)
                for state in superseded(opened, search).values():
                    counts[JobState(state)] -= 1
                info = RunInfo.of(search)
                rows.append(
                    [
                        search_id,
                        time.strftime("%Y-%m-%d %H:%M", time.localtime(search.created)),
                        str(sum(counts.values())),
                        *(str(counts.get(state, 0)) for state in shown),
                        "" if info is None else info.target,
                    ]
                )
        print_table(["search", "created", "jobs", *(state.value.lower() for state in shown), "target"], rows)
