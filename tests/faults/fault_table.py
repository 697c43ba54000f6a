"""The fault table, and where it stands in docs/reliability.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

__all__ = ["FAULTS", "PAGE", "RED", "Cells", "read", "render", "write"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- the fault table: begin -->", "<!-- the fault table: end -->"

#: How a cell begins that says that something does not hold.
RED = "RED: "

#: Every fault -> its name in the table.
FAULTS = {
    "sigkill": "SIGKILL of the worker",
    "sigsegv": "SIGSEGV",
    "os._exit": "`os._exit(3)`",
    "sys.exit": "`sys.exit(4)`",
    "exception": "an exception",
    "unpicklable": "an exception that does not pickle",
    "hang": "hangs in Python",
    "hang-c": "hangs in C, holding the interpreter",
    "hang-deaf": "hangs and ignores SIGTERM",
    "memory": "takes 550 MB",
    "children": "starts 50 children and returns",
    "children-hang": "starts 50 children and hangs",
    "streams": "closes stdout and stderr",
    "descriptors": "closes every descriptor",
    "unstorable": "returns what cannot be written to the storage",
    "rebuild-exits": "returns what exits when the program rebuilds it",
    "rebuild-hangs": "returns what hangs when the program rebuilds it",
    "held": "the program cannot run for longer than `job_timeout`",
    "disk": "the disk of the storage is full",
    "ctrl-c": "Ctrl-C: SIGINT to the program",
    "ctrl-c-group": "Ctrl-C: SIGINT to its process group",
    "kill-master": "`kill -9` of the program",
}


@dataclass(frozen=True)
class Cells:
    """What a backend makes of a fault.

    Attributes:
        job: how the faulty job, and only it, ends.
        others: the jobs beside it.
        afterwards: what comes after it.
        left: processes that are still there when the program has ended.
        bound: in which time.
    """

    job: str
    others: str
    afterwards: str
    left: str
    bound: str


Table = Mapping[tuple[str, str], Cells]


def render(table: Table, backends: list[str]) -> str:
    """The table, of (backend, fault) -> cells."""
    lines = ["| fault | " + " | ".join(f"`{name}`" for name in backends) + " |", "|---" * (len(backends) + 1) + "|"]
    for fault, title in FAULTS.items():
        cells = [table[name, fault].job if (name, fault) in table else "" for name in backends]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    for name in backends:
        lines += ["", f"### `{name}`", ""]
        lines += ["| fault | the job | other jobs | afterwards | left behind | within |", "|---|---|---|---|---|---|"]
        lines += [
            "| " + " | ".join([title, *astuple(table[name, fault])]) + " |"
            for fault, title in FAULTS.items()
            if (name, fault) in table
        ]
    return "\n".join(lines)


def read() -> dict[tuple[str, str], Cells]:
    """The table that stands in the page."""
    faults = {title: fault for fault, title in FAULTS.items()}
    table: dict[tuple[str, str], Cells] = {}
    name = None
    for line in part().splitlines():
        if heading := re.fullmatch(r"### `(.+)`", line):
            name = heading[1]
        elif name is not None and line.startswith("| "):
            title, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            if title in faults:
                table[name, faults[title]] = Cells(*cells)
    return table


def part() -> str:
    """What stands between the markers."""
    return PAGE.read_text().partition(_BEGIN)[2].partition(_END)[0].strip("\n")


def write(table: Table, backends: list[str]) -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    PAGE.write_text(f"{before}{_BEGIN}\n\n{render(table, backends)}\n\n{_END}{after}")
