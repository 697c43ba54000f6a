from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from evalkit.callbacks import LoggerCallback
from evalkit.job import Job, JobState

Ended = Callable[..., Job]


def test_one_line_for_each_end(ended: Ended, crashed: Callable[[], Job], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback = LoggerCallback()
    callback.on_done(ended(0.5))
    callback.on_done_other(ended(0.25))
    callback.on_done(crashed())
    callback.on_done(ended("F_diverged\nbadly"))
    callback.on_done(ended(state=JobState.CANCELLED, stop_message="stopped by\nthe user"))
    callback.on_done(ended({"loss": 3}))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "[1] job search.0 DONE: objective 0.5, best 0.5, failures 0"),
        ("INFO", "[2] job search.1 DONE: objective 0.25, best 0.5, failures 0"),
        (
            "WARNING",
            "[3] job search.2 FAILED/CRASH: WorkerDied: killed by SIGKILL, best 0.5, failures 1 (CRASH 1)",
        ),
        (
            "INFO",
            "[4] job search.3 DONE: objective F_diverged badly, best 0.5, failures 2 (CRASH 1, F_diverged badly 1)",
        ),
        (
            "INFO",
            "[5] job search.4 CANCELLED: stopped by the user, best 0.5, failures 2 (CRASH 1, F_diverged badly 1)",
        ),
        ("INFO", "[6] job search.5 DONE, best 0.5, failures 2 (CRASH 1, F_diverged badly 1)"),
    ]


def test_many_objectives_and_a_logger_of_ones_own(ended: Ended, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("mine")
    caplog.set_level(logging.DEBUG, "mine")
    callback = LoggerCallback(log, level=logging.DEBUG, minimize=True)
    callback.on_done(ended((1.0, 2.0)))
    callback.on_done(ended((2.0, 1.0)))
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("mine", "DEBUG", "[1] job search.0 DONE: objective (1, 2), front 1, failures 0"),
        ("mine", "DEBUG", "[2] job search.1 DONE: objective (2, 1), front 2, failures 0"),
    ]


def test_what_was_not_logged_still_counts(ended: Ended, caplog: pytest.LogCaptureFixture) -> None:
    callback = LoggerCallback(minimize=True)
    caplog.set_level(logging.ERROR)
    callback.on_done(ended(0.5))
    caplog.set_level(logging.INFO)
    callback.on_done(ended(0.75))
    assert [record.getMessage() for record in caplog.records] == [
        "[2] job search.1 DONE: objective 0.75, best 0.5, failures 0"
    ]


def test_a_long_error_is_cut(ended: Ended, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    LoggerCallback().on_done(ended("F_" + "x" * 5000))
    (record,) = caplog.records
    assert len(record.getMessage()) < 600
