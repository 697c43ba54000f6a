"""``python -m evalkit`` is the command ``evalkit``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The entry point of the command line."""
    try:
        from evalkit.cli.app import main as start
    except KeyboardInterrupt:  # while it loads
        sys.exit(130)
    start()


if __name__ == "__main__":
    main()
