"""Python functions as commands, for the suite: its run functions are Python, those of this backend make command lines.

As a program, ``python python_call.py FILE`` runs the pickled call that is in the file.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalkit import JobCause, RunningJob
from evalkit.backends import Failed, RunFailedError
from evalkit.backends.execution import failed, identity, run
from evalkit.backends.serialization import dumps, explain, loads
from evalkit.errors import SerializationError
from evalkit.running import is_coroutine_function


class PythonCall:
    """Makes the command line that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, job: RunningJob, **kwargs: Any) -> list[str]:
        function = functools.partial(self.function, **kwargs) if kwargs else self.function
        parts = (
            dumps(function, "run_function", function=True, in_band=True)[0],
            dumps(job.parameters, "args", in_band=True)[0],
        )
        descriptor, path = tempfile.mkstemp(suffix=".call")
        with open(descriptor, "wb") as file:
            file.write(dumps((*parts, job.id, job.attempt), "call", in_band=True)[0])
        return [sys.executable, __file__, path]


def read_answer(line: str) -> Any:
    """What the function returned; raise what it raised."""
    end = loads(base64.b64decode(line))
    if isinstance(end, Failed):
        raise RunFailedError(JobCause.EXCEPTION, end.error)
    return end.output


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


def main() -> None:
    channel = Printing()
    path = Path(sys.argv[1])
    function_data, args_data, job_id, attempt = loads(path.read_bytes())
    path.unlink()
    worker = identity("command")
    try:
        function, args = loads(function_data), loads(args_data)
    except BaseException as exc:  # noqa: BLE001 - whatever rebuilding them does
        end = failed(job_id, exc, None, worker)
    else:
        call = function
        if is_coroutine_function(function):
            call = lambda job: asyncio.run(function(job))  # noqa: E731
        end = run(call, RunningJob(args, job_id, attempt, channel), worker)
    try:
        answer = dumps(end, "output", in_band=True)[0]
    except SerializationError as exc:
        output = getattr(end, "output", None)
        answer = dumps(failed(job_id, explain(output, "output", exc.__cause__ or exc), None, worker), "output")[0]
    sys.stdout.flush()
    print(base64.b64encode(answer).decode(), flush=True)


if __name__ == "__main__":
    main()
