"""``python -m evalkit`` is the command ``evalkit``."""

from __future__ import annotations

from evalkit.cli.app import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
