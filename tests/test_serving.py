"""Processes that only serve, as those of an MPI program do: they keep nothing, and nobody waits for them in vain."""

from __future__ import annotations

import pytest

from evalkit import Callback, Evaluator
from evalkit.backends.thread import ThreadBackend
from evalkit.errors import EvaluatorClosedError, StorageError


class Rank(ThreadBackend):
    """One of several processes; notes what it is asked."""

    default_num_workers = None

    def __init__(self, is_master: bool) -> None:
        super().__init__(1)
        self._is_master = is_master
        self.asked: list[object] = []

    @property
    def is_master(self) -> bool:
        return self._is_master

    def start(self, run_function, emit) -> None:
        self.asked.append("start")
        if self._is_master:
            super().start(run_function, emit)

    def stop(self, grace) -> None:
        self.asked.append("stop")
        super().stop(grace)

    def release(self, exc) -> None:
        self.asked.append(exc)


class Loud(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_close(self) -> None:
        self.calls.append("on_close")


def run(job):
    return job["x"]


def test_who_serves_opens_nothing_calls_nobody_and_is_closed(tmp_path):
    rank, loud = Rank(is_master=False), Loud()
    url = f"sqlite:///{tmp_path / 's.db'}"
    with Evaluator(run, rank, storage=url, search_id="no such search", callbacks=[loud]) as evaluator:
        assert not evaluator.is_master
        evaluator.timeout = 10.0
        for use in (lambda: evaluator.submit([{"x": 1}]), lambda: evaluator.gather("ALL")):
            with pytest.raises(EvaluatorClosedError, match=r"if evaluator\.is_master"):
                use()
    assert evaluator.close() == []
    assert rank.asked == ["start"], "it served, and nothing else was asked of it"
    assert loud.calls == []
    assert not (tmp_path / "s.db").exists()


def test_who_drives_releases_the_others_when_all_is_stored(tmp_path):
    rank = Rank(is_master=True)
    with Evaluator(run, rank) as evaluator:
        evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
        assert rank.asked == ["start"]
    evaluator.close()
    assert rank.asked == ["start", "stop", None]


def test_the_others_learn_what_has_left_the_block():
    rank, error = Rank(is_master=True), ZeroDivisionError()
    with pytest.raises(ZeroDivisionError), Evaluator(run, rank):
        raise error
    assert rank.asked == ["start", "stop", error]


@pytest.mark.parametrize("settings", [{"storage": "sqlite:///no/folder/s.db"}, {"search_id": "no such search"}])
def test_the_others_learn_that_there_is_no_evaluator(settings):
    rank = Rank(is_master=True)
    with pytest.raises(StorageError) as caught:
        Evaluator(run, rank, **settings)
    assert rank.asked == [caught.value]
