"""SubprocessBackend: each job is a command of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import shlex
import signal
import socket
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from evalkit import ErrorInfo, JobCause, RunningJob
from evalkit.backends import AsyncBackend, Capabilities, RunFailedError, environment

__all__ = ["SubprocessBackend"]

_LONGEST_LINE = 2**30  # bytes
_TAIL = 20  # lines of stderr that an error shows


class SubprocessBackend(AsyncBackend):
    """Each job is a command, which the run function makes: it returns a list of words.

    The last line that the command prints is its output. A line ``{"progress": 0.5, "phase": "..."}`` or ``{"record":
    {...}}`` before it is told at once. A request to stop is SIGTERM, to the command and all that it started; what ends
    a job by force is SIGKILL.

    Args:
        num_workers: how many commands run at once.
        parse: makes the output of the last line; JSON by default.
        cwd: the directory that commands run in.
        logs: a directory in which ``<job id>.<attempt>.log`` has the command and all that it printed.
    """

    capabilities = Capabilities(kills_running=True, isolates_crashes=True, by_value=True, streams=True)

    def __init__(
        self,
        num_workers: int,
        *,
        parse: Callable[[str], Any] = json.loads,
        cwd: str | os.PathLike[str] | None = None,
        logs: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(num_workers)
        self._parse = parse
        self._cwd = cwd
        self._logs = None if logs is None else Path(logs)
        self._processes: dict[str, Process] = {}

    async def open(self) -> None:
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)

    async def execute(self, job: RunningJob) -> Any:
        words = self.run_function(job)
        if inspect.isawaitable(words):
            words = await words
        if isinstance(words, str) or not all(isinstance(word, str | os.PathLike) for word in words):
            raise TypeError(f"the run function returns the words of a command, as Command('...') does, not {words!r}")
        with contextlib.ExitStack() as stack:
            log = None
            if self._logs is not None:
                log = stack.enter_context(open(self._logs / f"{job.id}.{job.attempt}.log", "wb", buffering=0))
                log.write(f"$ {shlex.join(map(os.fspath, words))}\n".encode())
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                stderr=PIPE,
                limit=_LONGEST_LINE,
                cwd=self._cwd,
                env=os.environ | environment(job.resources),
                start_new_session=True,  # so that all of it can be ended
            )
            self._processes[job.id] = process
            try:
                self.say_where(job, socket.gethostname(), process.pid)
                if job.stopped():  # it was asked before there was anything to ask
                    self.ask_to_stop(job)
                last, tail = await asyncio.gather(self._listen(process, job, log), self._keep_tail(process, log))
                await process.wait()
            except BaseException:  # cancelled, or something else went wrong: all of it ends now
                _signal(process, signal.SIGKILL)
                await process.wait()
                raise
            finally:
                if self._processes.get(job.id) is process:
                    del self._processes[job.id]
        if process.returncode:
            raise RunFailedError(JobCause.CRASH, _describe(words, process.returncode, tail))
        if not last:
            return None
        try:
            return self._parse(last)
        except json.JSONDecodeError as exc:
            raise ValueError(f"the last line of what the command printed is not JSON: {last[:200]!r}: {exc}") from None

    def ask_to_stop(self, job: RunningJob) -> None:
        process = self._processes.get(job.id)
        if process is not None and process.returncode is None:
            _signal(process, signal.SIGTERM)

    async def _listen(self, process: Process, job: RunningJob, log: BinaryIO | None) -> str:
        """Read what the command prints; pass on what it tells, and return the last line."""
        last = ""
        async for line in _lines(process.stdout, log):
            text = line.decode(errors="replace").strip()
            if text and not _tell(job, text):
                last = text
        return last

    async def _keep_tail(self, process: Process, log: BinaryIO | None) -> list[str]:
        tail: deque[str] = deque(maxlen=_TAIL)
        async for line in _lines(process.stderr, log):
            tail.append(line.decode(errors="replace").rstrip())
        return list(tail)


async def _lines(stream: asyncio.StreamReader | None, log: BinaryIO | None) -> Any:
    while stream is not None and (line := await stream.readline()):
        if log is not None:
            log.write(line)
        yield line


def _tell(job: RunningJob, text: str) -> bool:
    """Report or record what a line says, if it says that."""
    if not text.startswith(('{"progress":', '{"record":')):
        return False
    try:
        said = json.loads(text)
        if "record" in said:
            job.record(**said["record"])
        else:
            job.report(said["progress"], said.get("phase", ""))
    except (ValueError, TypeError):
        return False  # it only looked like it
    return True


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _describe(words: list[str], code: int, tail: list[str]) -> ErrorInfo:
    name = None
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
    how = f"was ended by {name or f'signal {-code}'}" if code < 0 else f"ended with exit code {code}"
    said = f": {tail[-1]}" if tail else ""
    return ErrorInfo(
        type="CommandFailed",
        message=f"{shlex.join(map(os.fspath, words))} {how}{said}",
        traceback="\n".join(tail),
        exit_code=code if code > 0 else None,
        signal=name,
    )
