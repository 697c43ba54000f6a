"""What jobs print, as lines on the terminal while they run."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rich.text import Text

from evalkit.callbacks import Callback
from evalkit.job import Job

__all__ = ["LogStream"]

_INTERVAL = 0.2  # seconds between two looks at the jobs that run
_LONGEST_LINE = 4096  # bytes after which a line is shown though it has not ended


class LogStream(Callback):
    """Shows what jobs print, line by line, each with the id of its job.

    Args:
        show: called with one line at a time, from several threads but never at once.
    """

    def __init__(self, show: Callable[[Text], None]) -> None:
        self._show = show
        self._lock = threading.Lock()
        self._running: dict[str, _Followed] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def on_progress(self, job: Job) -> None:
        with self._lock:
            self._running.setdefault(job.id, _Followed(job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="evalkit-logs", daemon=True)
                self._thread.start()

    def on_done(self, job: Job) -> None:
        with self._lock:
            followed = self._running.pop(job.id, None) or _Followed(job)
            self._show_lines(job, followed.lines(final=True))

    def on_close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while not self._over.wait(_INTERVAL):
            with self._lock:
                for followed in self._running.values():
                    self._show_lines(followed.job, followed.lines(final=False))

    def _show_lines(self, job: Job, lines: list[bytes]) -> None:
        for line in lines:
            # Of a progress bar that draws over itself, from_ansi() takes the last state.
            text = Text.from_ansi(line.rstrip(b"\r").decode("utf-8", "backslashreplace"))
            self._show(Text.assemble((f"[{job.id}] ", "dim"), text))


class _Followed:
    """A job and how much of its log was shown."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._position = 0
        self._rest = b""

    def lines(self, *, final: bool) -> list[bytes]:
        """The lines that have come since the last call; at the end also one that has not ended."""
        log = self.job.printed
        if log is None:
            return []
        if log.size < self._position:  # another attempt
            self._position, self._rest = 0, b""
        new = self._rest + log.since(self._position)
        self._position = log.size
        *lines, self._rest = new.split(b"\n")
        if self._rest and (final or len(self._rest) > _LONGEST_LINE):
            lines.append(self._rest)
            self._rest = b""
        return lines
