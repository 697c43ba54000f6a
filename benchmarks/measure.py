"""What the benchmarks share: a fresh process a measurement, medians, and tables as plain text."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["MeasurementError", "in_fresh_process", "machine", "median", "print_table", "spread", "write_json"]

_HERE = Path(__file__).resolve().parent
_CHILD = """\
import json, sys
import {module}
result = {module}.{function}(*json.loads(sys.argv[1]))
if result is not None:
    print("RESULT", json.dumps(result), flush=True)
"""


class MeasurementError(RuntimeError):
    """A measurement failed; the message is what it printed last."""


def in_fresh_process(
    module: str, function: str, *args: Any, launcher: Sequence[str] = (), timeout: float = 600.0
) -> Any:
    """Call ``module.function(*args)``, of this folder, in an interpreter of its own.

    Args:
        args: what JSON can hold; so is the result.
        launcher: what goes before the interpreter, such as ``("mpiexec", "-n", "3")``.
        timeout: seconds.

    Raises:
        MeasurementError: it ended without a result.
    """
    search = [str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    code = _CHILD.format(module=module, function=function)
    try:
        done = subprocess.run(
            [*launcher, sys.executable, "-c", code, json.dumps(args)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"took longer than {timeout:g} s") from None
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    lines = (done.stderr or done.stdout).strip().splitlines()
    raise MeasurementError(lines[-1] if lines else f"exit code {done.returncode}")


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """From the least to the most, as text."""
    return f"{min(values):.4g}..{max(values):.4g}"


def machine() -> dict[str, Any]:
    """Where the figures come from; compare ratios, not times."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    rows = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    print(f"\n{title}")
    for index, row in enumerate(rows):
        first, *others = (
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
        if not index:
            print("  ".join("-" * width for width in widths))


def write_json(path: str, result: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps({"machine": machine()} | result, indent=2) + "\n", encoding="utf-8")
