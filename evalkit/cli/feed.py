"""Feed: hands configurations to an evaluator as fast as it uses them up, so that memory does not grow with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from evalkit.errors import EvaluatorClosedError, SearchStoppedError, StorageUnavailableError
from evalkit.evaluator import Evaluator

__all__ = ["Feed"]

_WINDOW = 4096  # jobs that are out at most; more for many workers
_CHUNK = 1024  # jobs a submit; an evaluator takes so many whole or not at all
_TURN = 0.05  # seconds; what is submitted while the search ends is waited for so long at a time


class Feed:
    """Reads configurations and submits them, in a thread of its own: a slow source holds up nobody who gathers.

    Args:
        configurations: None among them says that the next one has to be waited for, so what was read is submitted.
        take: whether to run a configuration; called once for each, in order.
        announce: called with each batch before it is submitted.
        patience: seconds for which a storage that is away is tried again.

    Attributes:
        error: what ended it early, to be raised by whoever waits for it; None if nothing did.
        exhausted: whether everything that was read was submitted, to the end.
        taken: how many configurations were submitted.
        skipped: how many ``take`` refused.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        configurations: Iterable[Mapping[str, Any] | None],
        *,
        take: Callable[[Mapping[str, Any]], bool],
        announce: Callable[[list[dict[str, Any]]], None],
        patience: float,
    ) -> None:
        self._evaluator = evaluator
        self._configurations = configurations
        self._take = take
        self._announce = announce
        self._patience = patience
        self._window = max(_WINDOW, 4 * evaluator.num_workers)
        self._changed = threading.Condition()
        self._out = 0
        self._stopped = False
        self._ended = False
        self._reading = False
        self.error: Exception | None = None
        self.exhausted = False
        self.taken = 0
        self.skipped = 0
        self._thread = threading.Thread(target=self._run, name="evalkit-feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_for_work(self) -> bool:
        """Wait until a job is out; say whether there is one, or everything was gathered and nothing comes any more."""
        with self._changed:
            # It may be below 0 for a moment: jobs can be gathered before the submit that made them has returned.
            while self._out <= 0 and not self._ended:
                over = self._stopped or self._evaluator.stop_reason is not None
                if over and self._reading:
                    break  # whatever comes from the source, it comes too late
                self._changed.wait(_TURN if over else min(self._evaluator.time_left, threading.TIMEOUT_MAX))
            return self._out > 0

    def gathered(self, count: int) -> None:
        """So many jobs are out no more."""
        with self._changed:
            self._out -= count
            if self._out <= self._window // 2:
                self._changed.notify_all()

    def stop(self) -> None:
        """Submit nothing more. What waits for its source is left to wait."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self, timeout: float) -> None:
        """After :meth:`stop`: wait until nothing more can be submitted, at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        # A thread that waits for its source may wait for ever; when something comes, it finds that it has to stop.
        while self._thread.is_alive() and not self._reading and time.monotonic() < deadline:
            self._thread.join(0.02)

    def _run(self) -> None:
        try:
            self._read()
            self.exhausted = not self._stopped
        except (SearchStoppedError, EvaluatorClosedError):
            pass  # the evaluator says why
        except Exception as exc:  # noqa: BLE001 - it is raised by whoever waits
            self.error = exc
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read(self) -> None:
        batch: list[dict[str, Any]] = []
        chunk = 1  # the first job starts at once, whatever comes after it
        source = iter(self._configurations)
        while not self._stopped:
            try:
                self._reading = True
                configuration = next(source)
                self._reading = False
            except StopIteration:
                break
            except Exception:
                # What was read before the source failed is as good as any.
                self._reading = False
                self._submit(batch)
                raise
            if configuration is None:
                batch = self._submit(batch)
            elif not self._take(configuration):
                self.skipped += 1
            else:
                batch.append(dict(configuration))
                if len(batch) >= chunk:
                    batch = self._submit(batch)
                    chunk = min(2 * chunk, _CHUNK)
        self._reading = False
        self._submit(batch)

    def _submit(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not batch:
            return []
        with self._changed:
            while self._out > 0 and self._out + len(batch) > self._window and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return []
        self._patiently(lambda: self._announce(batch))
        self._patiently(lambda: self._evaluator.submit(batch))
        with self._changed:
            self._out += len(batch)
            self.taken += len(batch)
            self._changed.notify_all()
        return []

    def _patiently(self, call: Callable[[], object]) -> None:
        deadline = time.monotonic() + self._patience
        delay = 0.1
        while True:
            try:
                call()
            except StorageUnavailableError:
                if self._stopped or time.monotonic() + delay > deadline:
                    raise
                time.sleep(delay)
                delay = min(2 * delay, 5.0)
            else:
                return
