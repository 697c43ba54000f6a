"""A storage that raises whatever it likes, for one job, for all, or for ever: gather returns, and nothing spins."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from evalkit import Evaluator, Job, JobState
from evalkit.errors import StorageUnavailableError
from evalkit.storage import JobUpdate, MemoryStorage
from evalkit.storage.codec import encode
from evalkit.testing.functions import echo


class Strange(BaseException):
    pass


class Refusing(MemoryStorage):
    """Takes no output that is one of ``refused``; with ``forever``, nothing of the job, whatever comes in its place."""

    durable = True

    def __init__(self, error: type[BaseException], refused: set[Any], *, forever: bool = False) -> None:
        super().__init__()
        self._error = error
        self._refused = refused
        self._forever = forever
        self.calls = 0

    def end_jobs(self, jobs: Sequence[Job]) -> None:
        self.update_jobs([JobUpdate.of(job) for job in jobs])

    def update_jobs(self, updates: Sequence[JobUpdate]) -> None:
        self.calls += 1
        numbers = {int(update.id.rpartition(".")[2]) for update in updates if self._forever}
        outputs = {update.output for update in updates if type(update.output) in (int, str)}
        if (numbers | outputs) & self._refused:
            raise self._error("no")
        super().update_jobs(updates)


ERRORS = [TypeError, RuntimeError, SystemExit, KeyboardInterrupt, MemoryError, GeneratorExit, Strange]


def text(job: Any) -> str:
    return f"{job['x']}"


@pytest.mark.parametrize("method", ["serial", "thread"])
@pytest.mark.parametrize("error", ERRORS)
def test_one_output_that_it_does_not_take(error: type[BaseException], method: str) -> None:
    storage = Refusing(error, {"3"})
    with Evaluator.create(text, method, {"storage": storage, "num_workers": 2}) as evaluator:
        evaluator.submit([{"x": x} for x in range(20)])
        jobs = evaluator.gather("ALL")
        records = storage.load_jobs(evaluator.search_id)
    assert [job.output for job in jobs] == [str(x) for x in range(20)]
    assert {record.state for record in records} == {JobState.DONE}
    stored = [record.output for record in records]
    assert stored[3].type_name == "builtins.str"
    assert stored[3].text == "'3'"
    assert stored[3].error.endswith("no")
    assert stored[:3] + stored[4:] == [str(x) for x in range(20) if x != 3]


@pytest.mark.parametrize("method", ["serial", "thread", "process"])
@pytest.mark.parametrize("error", [TypeError, SystemExit])
def test_jobs_that_it_never_takes(error: type[BaseException], method: str, caplog: pytest.LogCaptureFixture) -> None:
    storage = Refusing(error, set(range(0, 100, 2)), forever=True)
    with caplog.at_level(logging.INFO, "evalkit"), Evaluator.create(echo, method, {"storage": storage}) as evaluator:
        evaluator.submit([{"x": x} for x in range(100)])
        assert len(evaluator.gather("ALL")) == 100
        records = storage.load_jobs(evaluator.search_id, states=[JobState.DONE])
        assert [record.number for record in records] == list(range(1, 100, 2))
        calls, cpu = storage.calls, time.process_time()
        evaluator.submit([{"x": 101}])
        assert len(evaluator.gather("ALL")) == 1
        time.sleep(0.5)  # in which a thread that spins takes all of it
        assert time.process_time() - cpu < 0.4
        assert storage.calls - calls < 20
    lines = [record.getMessage() for record in caplog.records]
    assert 0 < len(lines) < 20
    assert lines[0].startswith(f"job {evaluator.search_id}.0 cannot be recorded: {error.__name__}: no")


def test_a_real_interrupt_is_not_taken_for_the_storages_own() -> None:
    """The first Ctrl-C waits for the write; the second is heard, and the results stay for the next gather."""

    class Slow(MemoryStorage):
        durable = True
        pressed = False

        def end_jobs(self, jobs: Sequence[Job]) -> None:
            if not self.pressed:
                if threading.current_thread() is not threading.main_thread():
                    raise StorageUnavailableError("the thread that gathers is to write")
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            self.update_jobs([JobUpdate.of(job) for job in jobs])

    storage = Slow()
    with Evaluator.create(text, "serial", {"storage": storage}) as evaluator:
        evaluator.submit([{"x": 1}])
        with pytest.raises(KeyboardInterrupt):
            evaluator.gather("ALL")
        assert [job.output for job in evaluator.gather("ALL")] == ["1"]
        assert storage.load_jobs(evaluator.search_id)[0].output == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_while_a_value_is_written(number: signal.Signals) -> None:
    def terminated(*_: object) -> None:
        raise SystemExit("SIGTERM")

    class Pressed:
        def __reduce__(self) -> Any:
            signal.raise_signal(number)
            return Pressed, ()

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            encode([Pressed()])
    finally:
        signal.signal(signal.SIGTERM, before)
