"""The lead by itself; that results come quickly through it is for the backends and the benchmarks to show.

It is lent to threads other than the main one here: that has a handler for the alarm of pytest-timeout.
"""

from __future__ import annotations

import threading

import pytest

from evalkit.backends import Lead
from evalkit.testing.backend_fixtures import BOUND, in_background


def test_who_only_looks_does_not_keep_the_backends_thread_away(monkeypatch: pytest.MonkeyPatch) -> None:
    lead = Lead()

    def never(*_: float) -> bool:
        pytest.fail("it has no time for a turn, and its owner none to lose")

    monkeypatch.setattr("evalkit.backends.lead.time.sleep", never)
    in_background(lead.lend, never, never, lambda: False, 0).result(BOUND)
    lead.take()
    lead.release()


def test_one_thread_at_a_time_takes_turns_until_it_has_what_it_waits_for() -> None:
    lead = Lead()
    reading, go_on = threading.Event(), threading.Event()
    turns: list[float] = []

    def turn(seconds: float) -> bool:
        reading.set()
        assert go_on.wait(BOUND)
        turns.append(seconds)
        return True

    first = in_background(lead.lend, turn, lambda: None, lambda: bool(turns), None)
    assert reading.wait(BOUND)
    in_background(lead.lend, lambda _: pytest.fail("two read"), lambda: None, lambda: False, None).result(BOUND)
    taking = in_background(lead.take)
    assert not taking.done()
    go_on.set()
    first.result(BOUND)
    assert len(turns) == 1
    assert turns[0] > 0
    taking.result(BOUND)  # the backend's thread has it back


def test_the_thread_of_the_backend_is_asked_to_end_its_turn() -> None:
    lead = Lead()
    asked = threading.Event()
    lead.take()

    def let_go() -> None:
        assert asked.wait(BOUND)
        lead.release()

    letting_go = in_background(let_go)
    turns: list[float] = []
    for _ in range(100):  # it asks again if the thread takes its time
        in_background(lead.lend, turns.append, asked.set, lambda: bool(turns), None).result(BOUND)
        if turns:
            break
    assert len(turns) == 1
    letting_go.result(BOUND)
