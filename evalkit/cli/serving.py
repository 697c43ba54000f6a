"""Processes of a program that was started many times (``mpiexec -n 8 evalkit run …``): one drives, others serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from evalkit.backends.base import Backend
from evalkit.cli.console import USAGE, silence
from evalkit.errors import EvalkitError
from evalkit.evaluator import Evaluator

__all__ = ["released_on_error", "serve"]


def serve(backend: Backend) -> None:
    """Run what the process that drives sends, until it is done. The messages are all its own.

    Raises:
        typer.Exit: it could not start.
    """
    silence()
    try:
        Evaluator(_never_called, backend)
    except EvalkitError:
        raise typer.Exit(USAGE) from None


@contextmanager
def released_on_error(backend: Backend) -> Iterator[None]:
    """See to it that nobody waits for a run that does not come about."""
    try:
        yield
    except BaseException as exc:
        backend.release(exc)
        raise


def _never_called(_job: Any) -> None:
    raise AssertionError("what runs comes from the process that drives")
