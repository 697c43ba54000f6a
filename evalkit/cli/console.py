"""The two consoles of the shell, the tables on them, and how errors end a command."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

import typer
from rich.console import Console
from rich.text import Text

from evalkit.errors import EvalkitError, TargetError

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "RESUME",
    "USAGE",
    "discard",
    "err",
    "fail",
    "out",
    "print_table",
    "reported",
    "show_log",
    "silence",
    "unread_is_fine",
    "warn",
]

#: Exit codes, beside 0: every job is done.
FAILED = 1
USAGE = 2
#: EX_TEMPFAIL of sysexits.h: ended in good order before it was done; the same with --resume goes on.
RESUME = 75
INTERRUPTED = 130


class _Results(Console):
    """Standard output; that its reader is gone is raised like all that keeps it from being written."""

    def on_broken_pipe(self) -> None:
        raise  # what is being handled, instead of exiting


class _Messages(Console):
    """Standard error, as far as anybody reads it: a message that cannot be written ends nothing."""

    @property
    def file(self) -> IO[str]:
        return _BestEffort(super().file)  # type: ignore[return-value]  # it does what the other does

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        raise AttributeError("messages go to standard error")


class _BestEffort:
    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


@functools.cache
def out() -> Console:
    """Standard output, for what was asked for."""
    return _Results(highlight=False, markup=False, emoji=False, soft_wrap=True)


@functools.cache
def err() -> Console:
    """Standard error, for all the rest: one console, so that messages do not overwrite a live display."""
    return _Messages(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def unread_is_fine() -> Iterator[None]:
    """Print what nobody has to read: that its reader is gone (``| head``, a terminal that was closed) is no failure."""
    try:
        yield
        sys.stdout.flush()
    except OSError as exc:
        if exc.errno not in (errno.EPIPE, errno.EIO):
            raise
        discard(sys.stdout)


def discard(stream: IO[str]) -> None:
    """Let what is left in this stream, and all that follows, go nowhere; the interpreter flushes it at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def silence() -> None:
    """Show nothing from now on: this process is one of many, and another one speaks for all."""
    out().quiet = err().quiet = True


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
    """Rows for people on a terminal; separated by tabs elsewhere, for programs.

    On a terminal, counts that are 0 everywhere are left out, and rows that are too wide for it become a paragraph each.
    """
    console = out()
    if not console.is_terminal:
        for row in (columns, *rows):
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))  # rich would expand the tabs
        return
    from rich.measure import Measurement
    from rich.table import Table

    kept = [place for place in range(len(columns)) if not rows or any(row[place] != "0" for row in rows)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place in kept:
        table.add_column(columns[place], no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[place]) for place in kept))
    if Measurement.get(console, console.options.update(max_width=1_000_000), table).maximum <= console.width:
        console.print(table)
        return
    label = max(len(columns[place]) for place in kept) + 2
    for row in rows:
        for place in kept:
            if row[place] not in ("", "0"):
                console.print(Text.assemble((f"{columns[place]:<{label}}", "bold"), row[place]))
        console.print()


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
