"""What this distribution brings; imported by evalkit to ask, so it imports no engine."""

from __future__ import annotations

from collections.abc import Sequence

from evalkit.hookspecs import BackendSpec, hookimpl

__all__ = ["evalkit_backends"]


@hookimpl
def evalkit_backends() -> Sequence[BackendSpec]:
    return [
        BackendSpec(
            "loky",
            "evalkit_loky.backend:LokyBackend",
            install="pip install 'loky>=3.4'",
            summary="worker processes of loky",
        )
    ]
