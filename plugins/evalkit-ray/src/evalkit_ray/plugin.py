"""What this distribution brings; imported by evalkit to ask, so it imports no engine."""

from __future__ import annotations

from collections.abc import Sequence

from evalkit.hookspecs import BackendSpec, hookimpl

__all__ = ["evalkit_backends"]


@hookimpl
def evalkit_backends() -> Sequence[BackendSpec]:
    return [
        BackendSpec(
            "ray",
            "evalkit_ray.backend:RayBackend",
            install="pip install 'ray>=2.60'",
            summary="tasks of Ray, on a cluster or on this machine",
        )
    ]
