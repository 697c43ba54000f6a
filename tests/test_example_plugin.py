"""examples/evalkit-subprocess is a whole distribution: it is installed, listed, and passes its own tests."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from installed import Installed

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "examples" / "evalkit-subprocess" / "README.md"

#: A part of the conformance suite that takes seconds; all of it passes.
_QUICK = (
    "every_kind_of_exception or crashed_fails or arrive_while or does_not_listen or told_of or "
    "without_close or cannot_import or large_arguments"
)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("example") / "evalkit-subprocess"
    shutil.copytree(PAGE.parent, folder, ignore=shutil.ignore_patterns("__pycache__", "*.db"))
    return Installed(folder, folder.parent / "env")


def test_evalkit_plugins_lists_it(plugin):
    rows = [line.split("\t") for line in plugin.run(str(plugin.python), "-m", "evalkit", "plugins").splitlines()]
    (row,) = [row for row in rows if row[0] == "subprocess"]
    assert row[1:4] == ["backend", "evalkit-subprocess", "0.1.0"]
    assert row[5] == "each job is a command"


def test_the_example_of_its_page_runs(plugin, tmp_path):
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "simulate").write_text('#!/bin/sh\necho "{\\"objective\\": $2}"\n')
    (tmp_path / "simulate").chmod(0o755)
    printed = plugin.run(str(plugin.python), "program.py", cwd=tmp_path)
    assert printed.splitlines() == ["0.1 0.1 None", "0.01 0.01 None"]


def test_its_page_is_one_screen():
    assert len(PAGE.read_text().splitlines()) <= 50


@pytest.mark.slow
def test_its_commands_do_what_they_say(plugin):
    assert re.match(r"\d\d passed", plugin.suite("-k", "test_commands"))


@pytest.mark.slow
def test_it_passes_the_conformance_suite(plugin):
    closing = plugin.suite("-k", f"TestSubprocess and ({_QUICK})")
    assert re.match(r"\d\d passed, \d+ deselected", closing), closing
