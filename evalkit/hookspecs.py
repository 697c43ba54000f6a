"""Every hook of evalkit, and the two markers. The built-ins come in through these very hooks.

A plugin is a module that implements some of them, named by an entry point in the group ``evalkit``::

    # pyproject.toml
    [project.entry-points.evalkit]
    pool = "evalkit_pool.plugin"

    # evalkit_pool/plugin.py
    from evalkit.hookspecs import BackendSpec, hookimpl

    @hookimpl
    def evalkit_backends():
        return [BackendSpec("pool", "evalkit_pool.backend:PoolBackend")]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

from evalkit.backends.base import BackendSpec
from evalkit.storage.base import StorageSpec

if TYPE_CHECKING:
    import typer

    from evalkit.evaluator import Evaluator

__all__ = [
    "PROJECT",
    "BackendSpec",
    "StorageSpec",
    "evalkit_backends",
    "evalkit_cli",
    "evalkit_evaluator_created",
    "evalkit_exit",
    "evalkit_storages",
    "hookimpl",
    "hookspec",
]

PROJECT = "evalkit"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def evalkit_backends() -> Sequence[BackendSpec]:  # type: ignore[empty-body]
    """Name the backends that this plugin brings. Called once; import no engine here."""


@hookspec
def evalkit_storages() -> Sequence[StorageSpec]:  # type: ignore[empty-body]
    """Name the storages that this plugin brings, by the scheme of their URLs. Called once; import no client here."""


@hookspec
def evalkit_evaluator_created(evaluator: Evaluator) -> None:
    """An evaluator was created, and nothing was submitted yet: the place to ``evaluator.add_callback(...)``."""


@hookspec
def evalkit_cli(app: typer.Typer) -> None:
    """The command line starts: the place to add commands to it."""


@hookspec
def evalkit_exit(code: int) -> None:
    """The command line is about to exit with this code: for engines whose other processes have to know."""
