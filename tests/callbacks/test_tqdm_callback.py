from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest

from evalkit.callbacks import TqdmCallback
from evalkit.job import Job

Ended = Callable[..., Job]


def last_drawn(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.rstrip("\n").split("\r")[-1]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_total_grows_with_what_is_submitted(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    callback = TqdmCallback(description="tuning")
    jobs = [ended(value) for value in (0.5, 0.75, "F_x")]
    for job in jobs:
        callback.on_launch(job)
    assert "0/3" in last_drawn(capsys)
    for job in jobs:
        callback.on_done(job)
    callback.on_done_other(ended(0.25))
    callback.on_close()
    drawn = last_drawn(capsys)
    assert drawn.startswith("tuning: 100%")
    assert "4/4" in drawn
    assert "best 0.75, failures 1" in drawn


def test_a_given_total_stays(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    callback = TqdmCallback(8, minimize=True)
    for value in (0.5, 0.25):
        job = ended(value)
        callback.on_launch(job)
        callback.on_done(job)
    callback.on_close()
    drawn = last_drawn(capsys)
    assert "2/8" in drawn
    assert "best 0.25, failures 0" in drawn


def test_many_objectives_show_the_front(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    callback = TqdmCallback()
    for output in ((1, 2), (2, 1), (0, 0)):
        callback.on_done(ended(output))
    callback.on_close()
    assert "front 2, failures 0" in last_drawn(capsys)


def test_it_leaves_nothing_behind_and_can_be_used_again(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    callback = TqdmCallback()
    callback.on_close()
    assert last_drawn(capsys) == ""
    for _ in range(2):
        job = ended(1.0)
        callback.on_launch(job)
        assert threading.active_count() == before
        callback.on_done(job)
        callback.on_close()
        callback.on_close()
        assert "1/1" in last_drawn(capsys)


def test_submitting_many_jobs_draws_little(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    callback = TqdmCallback()
    job = ended(1.0)
    for _ in range(20_000):
        callback.on_launch(job)
    callback.on_close()
    captured = capsys.readouterr().err
    assert captured.count("\r") < 1_000
    assert "/20000" in captured.split("\r")[-1]


def test_a_negative_total_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more, or None"):
        TqdmCallback(-1)


def test_tqdm_is_imported_by_the_first_job_only() -> None:
    out = run_python(
        """
        import sys
        import evalkit
        from evalkit.callbacks import TqdmCallback
        from evalkit.job import Job
        callback = TqdmCallback()
        print("tqdm" in sys.modules)
        callback.on_launch(Job("0.0", {}))
        print("tqdm.auto" in sys.modules)
        callback.on_close()
        """
    )
    assert out.split() == ["False", "True"]


def test_in_a_notebook_without_widgets_it_falls_back_to_text_though_warnings_are_errors() -> None:
    # What tqdm.auto goes by is the kernel's module and the class of its shell; both are named as a kernel has them.
    out = run_python(
        """
        import sys, types
        class ZMQInteractiveShell: ...
        ipython = types.ModuleType("IPython")
        ipython.get_ipython = ZMQInteractiveShell
        sys.modules["IPython"] = ipython
        sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
        from evalkit.callbacks import TqdmCallback
        from evalkit.job import Job
        callback = TqdmCallback()
        callback.on_launch(Job("0.0", {}))
        callback.on_close()
        print("tqdm.notebook" in sys.modules)
        """
    )
    assert out.split() == ["True"]
