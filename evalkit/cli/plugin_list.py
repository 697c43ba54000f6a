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
        import importlib.metadata

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
        rows += [
            [name, "backend", "not installed", "", "", install]
            for name, install in builtin.KNOWN_BACKENDS.items()
            if name not in found.backends
        ]
        for broken in found.broken:
            origin = broken.origin
            rows.append([origin.name, "broken", origin.distribution, origin.version, "", broken.reason])
        print_table(["name", "kind", "origin", "version", "capabilities", "summary"], rows)
        for version in sorted({other.version for other in importlib.metadata.distributions(name="evalkit")}):
            err().print(
                f"the distribution evalkit {version} is installed here too, with a package of the same name as "
                "evalkit-core: pip uninstall evalkit, then install evalkit-core again (in a clone of evalkit: "
                "pip install .)"
            )
        if tracebacks:
            for broken in found.broken:
                err().print(f"\n{broken.origin.name} ({broken.origin.distribution} {broken.origin.version}):")
                err().print(broken.traceback.rstrip())
