"""``evalkit run``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evalkit.cli.console import reported, show_log

if TYPE_CHECKING:
    from evalkit.cli.interrupts import Interrupts

__all__ = ["DEFAULT_STORAGE", "run"]

#: In the current folder: a result is durable unless the user says ``null://``.
DEFAULT_STORAGE = "sqlite:///evalkit.db"

_GRACE = 2.0  # seconds; the default of Evaluator

#: Options of the backend that have a flag of their own: name -> flag.
_FLAGS = {
    "num_workers": "--workers",
    "storage": "--storage",
    "search_id": "--search",
    "job_timeout": "--job-timeout",
    "resources": "--resource",
    "retries": "--retries",
    "callbacks": None,
    "run_function_kwargs": None,
    "worker_init": None,
}


def run(
    target: Annotated[
        str,
        typer.Argument(help="What to call: path/to/file.py:function or package.module:function.", show_default=False),
    ],
    params: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Configurations: a .csv or .jsonl file, or - for JSON Lines on standard input."
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V1,V2,…", help="Every combination of these values; once for each name."),
    ] = None,
    random: Annotated[int | None, typer.Option(metavar="N", help="Draw N configurations from --space.")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOW:HIGH[:log|:int]", help="What --random draws from, or NAME=a,b,c; once for each name."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes --random repeatable; a resume uses the one of the search.")
    ] = None,
    kwargs: Annotated[
        bool, typer.Option("--kwargs", help="Call function(lr=0.1, depth=3) instead of function(job).")
    ] = False,
    backend: Annotated[
        str, typer.Option("--backend", "-b", metavar="NAME", help="Where jobs run; evalkit plugins lists them.")
    ] = "process",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-w",
            metavar="N",
            help="Jobs at once. Default: the cores of this machine, on serial 1, on mpicomm every other rank.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the backend's own; may be repeated.")
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=U1,U2,…",
            help="Units of which each running job has one to itself, such as gpu=0,1; repeatable.",
        ),
    ] = None,
    job_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A job that runs longer has failed, and is ended.")
    ] = None,
    retries: Annotated[
        int, typer.Option(metavar="N", help="More attempts for a job whose worker crashed or was lost.")
    ] = 0,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Time for the whole run; what is not done by then is cancelled."),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN",
            help="When all has to be over: 17:30, 2026-05-01T17:30, +1h30m, slurm or none. Default: the end of the "
            "Slurm job that this runs in.",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long before the deadline nothing is started any more: about as long as a job takes.",
        ),
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="URL", help="Where results are kept; null:// keeps nothing.")
    ] = DEFAULT_STORAGE,
    search: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The name under which they are kept; by default the next free number."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Run what is not done of a search: of --search NAME, or else of the newest one with the same target "
            "and configurations. Without configurations, what is stored as not done. Starts it if there is none.",
        ),
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: run what failed again too.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write a row for each finished job to a .csv or .jsonl file."),
    ] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="The best objective is the smallest.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show what jobs print as it comes, each line with its job (on process)."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors and warnings.")] = False,
) -> None:
    """Run a function over many configurations.

    Values in CSV cells, --grid, --space and --option are read as int, float, bool (true, false), None (none, null, an
    empty cell) or else as strings; 007 stays a string, and "7" in double quotes is one.

    What ended is done, failed or not; what was cancelled, or was waiting or running when a run was killed, is not.

    Exit codes: 0 all is done; 1 something failed or was not run; 2 bad usage; 75 ended before it was done by the
    deadline, SIGTERM, SIGUSR1 or SIGHUP, so that the same with --resume goes on; 130 after Ctrl-C.
    """
    from evalkit.cli.interrupts import Interrupts

    with reported(), Interrupts() as interrupts:
        show_log()
        code = _run(
            interrupts,
            target,
            kwargs,
            (params, grid or [], random, space or [], seed),
            workers,
            option or [],
            resource or [],
            job_timeout,
            retries,
            storage,
            {
                "backend": backend,
                "search": search,
                "resume": resume,
                "retry_failed": retry_failed,
                "seed": seed,
                "output": output,
                "timeout": timeout,
                "deadline": (deadline, margin),
                "minimize": minimize,
                "verbose": verbose,
                "quiet": quiet,
            },
        )
    raise typer.Exit(code)


def _run(
    interrupts: Interrupts,
    target: str,
    kwargs: bool,
    supply: tuple[str | None, list[str], int | None, list[str], int | None],
    workers: int | None,
    options: list[str],
    resources: list[str],
    job_timeout: float | None,
    retries: int,
    storage: str,
    rest: dict[str, Any],
) -> int:
    # Here and not above, so that --help has nothing to load.
    from evalkit.cli.deadline import deadline_of
    from evalkit.cli.output import check_output
    from evalkit.cli.runner import Runner, RunOptions
    from evalkit.cli.serving import released_on_error, serve
    from evalkit.cli.source import source_of
    from evalkit.engine.arguments import check_seconds, make_backend
    from evalkit.errors import ParametersError
    from evalkit.plugins import plugins

    method_kwargs = _backend_options(options) | _workers(workers, rest["backend"]) | {"retries": retries}
    if resources:
        method_kwargs["resources"] = _resources(resources)
    if job_timeout is not None:
        method_kwargs["job_timeout"] = job_timeout
    backend, settings = make_backend(rest["backend"], method_kwargs)
    if not backend.is_master:
        interrupts.release()
        serve(backend)
        return 0
    with released_on_error(backend):
        limits = (("--timeout", rest["timeout"]), ("--job-timeout", job_timeout), ("--margin", rest["deadline"][1]))
        for name, seconds in limits:
            if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
                raise ParametersError(f"{name} takes a positive number of seconds, not {seconds:g}")
        if rest["retry_failed"] and not rest["resume"]:
            raise ParametersError("--retry-failed goes with --resume: it runs again what failed before")
        grace = settings.get("grace", _GRACE)
        check_seconds("grace", grace, zero=True)
        when, margin = rest["deadline"]
        rest["deadline"] = deadline_of(when, margin, grace)
        if rest["output"] is not None:
            check_output(rest["output"])
        source = source_of(*supply)
        if source is None and not rest["resume"]:
            raise ParametersError(
                "say what to run: --params FILE, --grid NAME=V1,V2 or --random N --space NAME=LOW:HIGH"
            )
        function = _function(target, kwargs)
        with closing(plugins().open_storage(storage)) as opened:
            run_options = RunOptions(target=target, settings=settings, **rest)
            return Runner(run_options, function, source, opened, backend).run(interrupts)


def _function(target: str, kwargs: bool) -> Callable[..., Any]:
    from evalkit.cli.target import load_target, takes_one_argument
    from evalkit.errors import TargetError
    from evalkit.running import call_with_kwargs

    function = load_target(target)
    if kwargs:
        return call_with_kwargs(function)
    if not takes_one_argument(function):
        raise TargetError(
            f"{target} cannot be called as function(job); to have it called with keyword arguments, add --kwargs"
        )
    return function


def _backend_options(options: list[str]) -> dict[str, Any]:
    from evalkit.cli.scalars import parse_scalar
    from evalkit.errors import ParametersError

    values: dict[str, Any] = {}
    for entry in options:
        key, separator, text = entry.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key:
            raise ParametersError(f"--option {entry!r}: write KEY=VALUE")
        if key in _FLAGS:
            flag = _FLAGS[key]
            raise ParametersError(f"--option {entry!r}: " + (f"use {flag}" if flag else "this is for programs only"))
        if key in values:
            raise ParametersError(f"--option {entry!r}: {key!r} was given before")
        values[key] = parse_scalar(text)
    return values


def _resources(given: list[str]) -> dict[str, list[str]]:
    from evalkit.engine.resources import check_resources
    from evalkit.errors import ParametersError

    resources: dict[str, list[str]] = {}
    for entry in given:
        kind, separator, units = entry.partition("=")
        kind = kind.strip()
        if not separator or not kind:
            raise ParametersError(f"--resource {entry!r}: write KIND=UNIT,UNIT, such as gpu=0,1")
        if kind in resources:
            raise ParametersError(f"--resource {entry!r}: {kind!r} was given before; write all its units in one list")
        resources[kind] = [unit.strip() for unit in units.split(",")]
    check_resources(resources)  # before anything starts
    return resources


def _workers(given: int | None, backend: str) -> dict[str, int]:
    from evalkit.plugins import plugins

    if given is not None:
        return {"num_workers": given}
    if backend == "serial" or plugins().backend_class(backend).default_num_workers is None:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"num_workers": cores}
