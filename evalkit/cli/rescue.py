"""What to do when a run ends before its time: where unsaved results go, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence

from evalkit.cli.console import fail
from evalkit.cli.output import JSONLinesCallback
from evalkit.job import Job

__all__ = ["rescue", "resume_line"]


def rescue(search_id: str, jobs: Sequence[Job]) -> None:
    """The storage did not take these results: put them into a file, in the current folder if possible, and say so."""
    if not jobs:
        return
    name = f"evalkit-unsaved-{''.join(c if c.isalnum() else '_' for c in search_id)}-{os.getpid()}.jsonl"
    for folder in (os.getcwd(), tempfile.gettempdir()):
        path = os.path.join(folder, name)
        try:
            writer = JSONLinesCallback(path)
            for job in jobs:
                writer.on_done(job)
            writer.on_close()
        except (OSError, ValueError) as exc:
            fail(f"{path}: {exc}")
        else:
            fail(f"{len(jobs):,} results are not in the storage, but in {path}")
            return


def resume_line(search_id: str, *, named: bool, resumed: bool) -> str:
    """The command that goes on where this one has ended.

    Args:
        named: whether this one has ``--search``.
        resumed: whether it has ``--resume``.
    """
    words = ["evalkit", *sys.argv[1:]]
    if not named:
        words += ["--search", search_id]
    if not resumed:
        words.append("--resume")
    return shlex.join(words)
