"""The command line: one file a command. :func:`evalkit.cli.app.main` is where it starts."""

__all__: list[str] = []
