"""``evalkit export``."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from typing import Annotated

import typer

from evalkit.cli.console import err, fail, reported
from evalkit.cli.run import DEFAULT_STORAGE

__all__ = ["export"]


def export(
    search: Annotated[str, typer.Argument(help="The search to export.", show_default=False)],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", help="A .csv or .jsonl file; replaced as a whole.", show_default=False
        ),
    ],
    storage: Annotated[str, typer.Option(metavar="URL", help="The storage it is in.")] = DEFAULT_STORAGE,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what was cancelled, has not ended, or was run again under another id.")
    ] = False,
) -> None:
    """Write the results of a search to a file: each configuration once, however often the search was resumed.

    The columns of a CSV file are those of evalkit's CSVCallback, which DeepHyper's tools read.
    """
    with reported():
        from evalkit.cli.output import check_output, writer_for
        from evalkit.cli.records import is_settled, iterate, job_of, open_existing, superseded

        check_output(output)
        with closing(open_existing(storage)) as opened:
            record = opened.load_search(search)
            gone = superseded(opened, record)
            folder, name = os.path.split(os.path.realpath(output))
            written = left_out = 0
            try:
                # The file is made in a folder that only this user can enter: that of the output may be everybody's.
                with tempfile.TemporaryDirectory(prefix=".evalkit-", dir=folder) as private:
                    temporary = os.path.join(private, name)
                    writer = writer_for(temporary)
                    for one in iterate(opened, search):
                        if everything or (is_settled(one) and one.id not in gone):
                            writer.on_done(job_of(one))
                            written += 1
                        elif one.id not in gone:
                            left_out += 1
                    writer.on_close()
                    with open(temporary, "ab"):
                        pass  # a search without results is an empty file
                    os.replace(temporary, os.path.join(folder, name))
            except OSError as exc:
                fail(f"{output} cannot be written: {exc}")
                raise typer.Exit(1) from None
        err().print(f"{written:,} jobs written to {output}")
        if left_out:
            err().print(f"{left_out:,} that were cancelled or have not ended are left out; --all takes them in")
