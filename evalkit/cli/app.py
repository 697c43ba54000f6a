"""The command ``evalkit``: its commands, and those that plugins add."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from evalkit.cli.export import export
from evalkit.cli.ls import ls
from evalkit.cli.plugin_list import list_plugins
from evalkit.cli.run import run
from evalkit.cli.show import show
from evalkit.plugins import plugins

__all__ = ["create_app", "main"]

_log = logging.getLogger("evalkit")


def create_app() -> typer.Typer:
    """Build the command, with what plugins add to it through the hook ``evalkit_cli``.

    A plugin that fails in it is logged, and takes no other command along; it cannot replace a command of evalkit.
    """
    app = typer.Typer(
        name="evalkit",
        help="Run a function over many configurations, on any engine, and lose nothing.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # brackets in the help are brackets
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name, command in (("run", run), ("ls", ls), ("show", show), ("export", export), ("plugins", list_plugins)):
        app.command(name)(command)
    _add_commands_of_plugins(app)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from evalkit import __version__
        from evalkit.cli.console import out

        out().print(f"evalkit {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Run a function over many configurations, on any engine, and lose nothing."""


def _add_commands_of_plugins(app: typer.Typer) -> None:
    for hook in plugins().hook.evalkit_cli.get_hookimpls():
        commands, groups = list(app.registered_commands), list(app.registered_groups)
        own = {command.name for command in commands}
        try:
            hook.function(*([app] if "app" in hook.argnames else []))
        except Exception as exc:  # noqa: BLE001 - a stranger's code
            app.registered_commands, app.registered_groups = commands, groups
            _log.warning("the plugin %s adds no commands: %s: %s", hook.plugin_name, type(exc).__name__, exc)
            continue
        for command in [command for command in app.registered_commands if command not in commands]:
            if command.name in own:
                app.registered_commands.remove(command)
                _log.warning("the plugin %s cannot replace the command %s", hook.plugin_name, command.name)


def main() -> None:
    """The entry point of the command line."""
    from evalkit.cli.console import FAILED, INTERRUPTED, fail, show_log

    # A stream that was closed (>&-) goes nowhere, instead of into the next file that happens to be opened.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the program runs
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever is in the parameters, it can be shown
    show_log()
    try:
        create_app()(prog_name="evalkit")
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except SystemExit as exc:
        _leave(exc.code if isinstance(exc.code, int) else 0 if exc.code is None else FAILED)
    except BrokenPipeError:
        raise  # who read it has had enough, which the interpreter knows how to end with
    except OSError as exc:
        fail(f"the output cannot be written: {exc.strerror or exc}")
        os._exit(FAILED)  # without another try to write what is left


def _leave(code: int) -> NoReturn:
    """Exit with this code, whatever comes while the interpreter ends."""
    from evalkit.cli.console import discard
    from evalkit.cli.interrupts import SYSTEM

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    for number in SYSTEM:
        signal.signal(number, signal.SIG_IGN)  # it is about to end, and its exit code is worth more than to end sooner
    try:
        plugins().hook.evalkit_exit(code=code)
    except Exception:  # noqa: BLE001 - a stranger's hook may do anything
        _log.exception("a plugin failed in evalkit_exit")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)
    sys.exit(code)
