"""Each job of evalkit as a command."""

from evalkit_subprocess.command import Command

__all__ = ["Command"]
