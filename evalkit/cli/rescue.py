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
    name = f"evalkit-unsaved-{''.join(c if c.isalnum() else '_' for c in search_id)}-"
    for folder in (os.getcwd(), tempfile.gettempdir()):
        path = os.path.join(folder, name)
        try:
            # A new file with a name that nobody can guess, for this user alone: the folder may be everybody's.
            fd, path = tempfile.mkstemp(prefix=name, suffix=".jsonl", dir=folder)
            os.close(fd)
            writer = JSONLinesCallback(path)
            for job in jobs:
                writer.on_done(job)
            writer.on_close()
        except OSError as exc:
            fail(f"{path}: {exc}")
        else:
            fail(f"{len(jobs):,} results are not in the storage, but in {path}")
            return


def resume_line(search_id: str, url: str, *, named: bool, resumed: bool) -> str:
    """The command that goes on where this one has ended.

    Args:
        url: of the storage, as it may be shown.
        named: whether this one has ``--search``.
        resumed: whether it has ``--resume``.
    """
    words = ["evalkit", *sys.argv[1:]]
    for place, word in enumerate(words):
        option, equals, given = word.partition("=") if word.startswith("--storage=") else ("", "", word)
        if (equals or words[place - 1] == "--storage") and not given.startswith("sqlite"):  # maybe a password
            words[place] = f"{option}{equals}{url}"
    if not named:
        words += ["--search", search_id]
    if not resumed:
        words.append("--resume")
    return shlex.join(words)
