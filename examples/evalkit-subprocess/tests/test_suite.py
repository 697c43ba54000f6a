"""The conformance suite: the backend is held to what every backend of evalkit is held to."""

from __future__ import annotations

import functools
import tempfile
from typing import ClassVar

import pytest
from python_call import PythonCall, parse

from evalkit.testing import BackendSuite


class TestSubprocess(BackendSuite):
    method = "subprocess"
    tiny_jobs = 100  # each is an interpreter
    options: ClassVar = {"parse": parse}

    def prepare(self, run_function):
        inner = run_function.func if isinstance(run_function, functools.partial) else run_function
        if isinstance(inner, PythonCall):
            return run_function
        return PythonCall(super().prepare(run_function))

    @pytest.fixture(autouse=True)
    def calls_are_in_the_folder_of_the_test(self, tmp_path, monkeypatch):
        folder = tmp_path / "calls"
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
