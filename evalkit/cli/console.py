"""The two consoles of the shell, the tables on them, and how errors end a command."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from evalkit.errors import EvalkitError, TargetError

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "RESUME",
    "USAGE",
    "err",
    "fail",
    "out",
    "print_table",
    "reported",
    "show_log",
    "warn",
]

#: Exit codes, beside 0: every job is done.
FAILED = 1
USAGE = 2
#: EX_TEMPFAIL of sysexits.h: ended in good order before it was done; the same with --resume goes on.
RESUME = 75
INTERRUPTED = 130


@functools.cache
def out() -> Console:
    """Standard output, for what was asked for."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


@functools.cache
def err() -> Console:
    """Standard error, for all the rest: one console, so that messages do not overwrite a live display."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def warn(message: str) -> None:
    """Say something that the user should know."""
    err().print(Text.assemble(("warning: ", "yellow"), message))


def fail(message: str) -> None:
    """Say what went wrong."""
    err().print(Text.assemble(("error: ", "bold red"), message))


@contextmanager
def reported() -> Iterator[None]:
    """Turn what users can cause into a message and an exit code, without a traceback of ours.

    Raises:
        typer.Exit: with :data:`USAGE`, or :data:`INTERRUPTED` for Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except (EvalkitError, ValueError, TypeError) as exc:
        if isinstance(exc, TargetError) and exc.__cause__ is not None:
            from evalkit.cli.target import user_traceback

            err().print(user_traceback(exc.__cause__))
        elif not isinstance(exc, EvalkitError) and not _is_about_input(exc):
            raise
        fail(str(exc))
        raise typer.Exit(USAGE) from None


def _is_about_input(exc: BaseException) -> bool:
    """Whether the evaluator raised it about its arguments, rather than a defect of ours."""
    place = exc.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = "" if place is None else str(place.tb_frame.f_globals.get("__name__", ""))
    return not module.startswith("evalkit.cli.")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows for people on a terminal; separated by tabs elsewhere, for programs."""
    console = out()
    if not console.is_terminal:
        for row in (columns, *rows):
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))  # rich would expand the tabs
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def show_log() -> None:
    """Show what evalkit logs as messages of a line, above a live display."""
    logger = logging.getLogger("evalkit")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler(logging.WARNING))
        logger.propagate = False


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            exc = record.exc_info[1] if record.exc_info else None
            if exc is not None:
                message = f"{message} ({type(exc).__name__}: {exc})"
            (fail if record.levelno >= logging.ERROR else warn)(message)
        except Exception:  # noqa: BLE001 - what logging asks of its handlers
            self.handleError(record)
