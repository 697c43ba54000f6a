"""Python functions as commands, for the suite: its run functions are Python, those of this backend make command lines.

As a program, ``python python_call.py FILE`` runs the packed call that is in the file.
"""

from __future__ import annotations

import base64
import functools
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalkit import RunningJob
from evalkit.backends import pack_call, read_answer, run_call


class PythonCall:
    """Makes the command line that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, job: RunningJob, **kwargs: Any) -> list[str]:
        call = pack_call(functools.partial(self.function, **kwargs) if kwargs else self.function, job)
        descriptor, path = tempfile.mkstemp(suffix=".call")
        with open(descriptor, "wb") as file:
            file.write(call)
        return [sys.executable, __file__, path]


class Printing:
    """The channel of the function: it prints, and hears of a request by SIGTERM."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_: object) -> None:
        self._asked = True

    def progress(self, job_id: str, progress: float, phase: str) -> None:
        print(json.dumps({"progress": progress, "phase": phase}), flush=True)

    def record(self, job_id: str, values: dict[str, Any]) -> None:
        print(json.dumps({"record": values}), flush=True)

    def stop_requested(self, job_id: str) -> bool:
        return self._asked


def parse(line: str) -> Any:
    """What the function returned; raise what it raised."""
    return read_answer(base64.b64decode(line), RunningJob({}, "", 0, None))  # what it said has come by the channel


def main() -> None:
    channel = Printing()
    path = Path(sys.argv[1])
    call = path.read_bytes()
    path.unlink()
    print(base64.b64encode(run_call(call, channel)).decode(), flush=True)


if __name__ == "__main__":
    main()
