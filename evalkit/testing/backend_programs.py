"""The conformance suite of backends: whole programs, and how they end."""

# ruff: noqa: S101 - assertions are what tests are made of

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cloudpickle
import pytest

from evalkit.testing.backend_fixtures import BOUND, BackendFixtures, Files, eventually
from evalkit.testing.processes import Mark

__all__ = ["BackendPrograms"]

#: The suite makes the evaluator of a program too, so that a backend which no plugin names has its tests.
_PROGRAM = """
import functools, importlib, importlib.util, pathlib, sys, time
import cloudpickle
from evalkit.testing import functions

def load(name, file):
    try:
        return importlib.import_module(name)
    except ImportError:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

def create(function, **kwargs):
    suite = functools.reduce(getattr, {path!r}, load({module!r}, {file!r}))()
    suite.options = cloudpickle.loads({options!r})
    return suite.create(function, **kwargs)

def main():
{body}

if __name__ == "__main__":
    main()
"""


class BackendPrograms(BackendFixtures):
    """What ends without ``close``, or by a crash, ends, and leaves nothing behind."""

    @pytest.mark.parametrize("end", ["pass", "raise RuntimeError('the program fails')"])
    def test_an_interpreter_that_ends_without_close_leaves_nothing(
        self, files: Files, tmp_path: Path, end: str
    ) -> None:
        body = f"""
            evaluator = create(functions.hold, num_workers=2, grace=0.2)
            if evaluator.is_master:
                evaluator.submit([{files.holder("a")!r}, *({{"x": x}} for x in range(20))])
                while {not self.inline} and not pathlib.Path({files["a.started"]!r}).exists():
                    time.sleep(0.01)
                pathlib.Path({files["over.started"]!r}).touch()
                {end}
        """
        with self._program(body, tmp_path) as program:
            if not self.exits_at_once:
                files.wait("over.started")
                files.release("a")
            _, errors = program.communicate(timeout=2 * BOUND)
        assert not Path(files["a.release.missed"]).exists(), "what ran was not ended: it gave up by itself"
        assert (program.returncode == 0) == (end == "pass"), errors
        assert ("Traceback" in errors) == (end != "pass"), errors
        assert end == "pass" or "the program fails" in errors

    def test_where_nothing_isolates_them_a_crash_is_one_of_the_program(self, tmp_path: Path) -> None:
        self.need(not self.can.isolates_crashes, "crashes that reach the program")
        body = """
            with create(functions.die) as evaluator:
                if evaluator.is_master:
                    evaluator.submit([{"x": 1}, {"x": 2, "how": "exit"}])
                    evaluator.gather("ALL")
                    print("it went on")
        """
        with self._program(body, tmp_path) as program:
            printed, errors = program.communicate(timeout=2 * BOUND)
        assert program.returncode != 0, errors
        assert "it went on" not in printed, "a backend that survives this should claim isolates_crashes"

    @contextmanager
    def _program(self, body: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
        """A program that runs; at the end, wait until it and all that it started are gone."""
        cls = type(self)
        self.need("<locals>" not in cls.__qualname__, "class that a program could import")
        script = folder / "program.py"
        script.write_text(
            _PROGRAM.format(
                path=cls.__qualname__.split("."),
                module=cls.__module__,
                file=inspect.getfile(cls),
                options=cloudpickle.dumps(dict(self.options)),
                body=textwrap.indent(textwrap.dedent(body), "    "),
            )
        )
        mark = Mark()
        environment = os.environ | mark.environment
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        program = subprocess.Popen(
            self.command(script), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            with program:
                try:
                    yield program
                except BaseException:
                    program.kill()
                    raise
            eventually(lambda: not mark.processes(), "the end of all processes of the program")
        finally:
            for process in mark.processes():
                process.kill()
