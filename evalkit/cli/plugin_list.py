"""``evalkit plugins``."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

import typer

from evalkit.cli.console import err, print_table, reported

__all__ = ["list_plugins"]


def list_plugins(
    tracebacks: Annotated[
        bool, typer.Option("--traceback", help="Show all of the exception of what is broken.")
    ] = False,
) -> None:
    """List backends and storages: where each comes from, what it can do, and what is broken and why."""
    with reported():
        from evalkit import builtin
        from evalkit.backends.base import Capabilities
        from evalkit.errors import PluginError
        from evalkit.plugins import plugins

        found = plugins()
        rows = []
        for name, (backend, origin) in found.backends.items():
            try:
                able = found.backend_class(name).capabilities
            except PluginError as exc:
                abilities = f"broken: {exc}"
            else:
                abilities = ", ".join(
                    one.name.replace("_", " ") for one in fields(Capabilities) if getattr(able, one.name)
                )
            rows.append([name, "backend", origin.distribution, origin.version, abilities, backend.summary])
        for scheme, (storage, origin) in found.storages.items():
            rows.append([f"{scheme}://", "storage", origin.distribution, origin.version, "", storage.summary])
        for kind, known, there in (
            ("backend", builtin.KNOWN_BACKENDS, found.backends),
            ("storage", builtin.KNOWN_STORAGES, found.storages),
        ):
            rows += [
                [name if kind == "backend" else f"{name}://", kind, "not installed", "", "", install]
                for name, install in known.items()
                if name not in there
            ]
        for broken in found.broken:
            origin = broken.origin
            rows.append([origin.name, "broken", origin.distribution, origin.version, "", broken.reason])
        print_table(["name", "kind", "origin", "version", "capabilities", "summary"], rows)
        if tracebacks:
            for broken in found.broken:
                err().print(f"\n{broken.origin.name} ({broken.origin.distribution} {broken.origin.version}):")
                err().print(broken.traceback.rstrip())
