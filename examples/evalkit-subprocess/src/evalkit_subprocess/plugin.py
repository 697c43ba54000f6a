"""What evalkit reads when it looks for backends; it imports no engine."""

from __future__ import annotations

from evalkit.backends import BackendSpec
from evalkit.hookspecs import hookimpl

__all__ = ["evalkit_backends"]


@hookimpl
def evalkit_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            "subprocess",
            "evalkit_subprocess.backend:SubprocessBackend",
            summary="each job is a command",
        )
    ]
