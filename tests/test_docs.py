"""The documentation is true: its examples run, its links lead somewhere, and what it quotes stands where it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the comment right above it."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*pages: Path) -> Iterator[Block]:
    for page in pages:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("text")) + 1
            yield Block(page, line, match["mark"] or "", match["language"], match["text"])


# What CONTRIBUTING.md shows is a whole plugin, which test_contributing.py builds.
PYTHON = [block for block in blocks(*PAGES) if block.language == "python" and block.page.name != "CONTRIBUTING.md"]
QUOTED = [block for block in PYTHON if block.mark.startswith("from ")]
PROGRAMS = [block for block in PYTHON if not block.mark]
SUITE = [block for block in PYTHON if block.mark == "suite"]
SHELL = [block for block in blocks(ROOT / "README.md") if block.language == "sh" and block.mark == "run"]


@pytest.fixture
def environment(tmp_path):
    """That of a user: this evalkit, its command, and warnings that are errors."""
    command = tmp_path / "bin" / "evalkit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m evalkit "$@"\n')
    command.chmod(0o755)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONWARNINGS": "error",
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def run(tmp_path, environment):
    """Run a command in an empty folder, and return what it prints."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(*args: str) -> str:
        done = subprocess.run(
            args, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    return run


def python(run, block: Block) -> list[str]:
    program = run.folder / "program.py"
    program.write_text(block.text)
    return run(sys.executable, "program.py").splitlines()


def test_there_is_something_to_check():
    assert len(PROGRAMS) >= 6
    assert len(QUOTED) == 2
    assert len(SHELL) == 1
    assert len(SUITE) == 1
    assert not [str(block) for block in PYTHON if block.mark and block not in [*QUOTED, *SUITE]]


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_python_examples_run(run, block):
    assert python(run, block), "it prints something"


def test_the_first_example_prints_what_it_says(run):
    lines = python(run, PROGRAMS[0])
    assert sorted(float(line.split()[-1]) for line in lines) == [-4, -4, -1, -1, 0]
    assert {line.split()[1] for line in lines} == {"DONE"}
    assert (run.folder / "study.db").exists()


def test_the_callbacks_example_stops_early_and_shows_the_failure(run):
    (block,) = [block for block in PROGRAMS if "EarlyStopping" in block.text]
    first, last = python(run, block)
    assert first.startswith("0.0 failed: EXCEPTION, ZeroDivisionError")
    assert "3 jobs in a row ended without improvement" in last
    assert len((run.folder / "results.csv").read_text().splitlines()) == 6


#: A part of it that takes seconds; all of it passes.
QUICK = "submission or batches_are or kind_of_exception or coroutine_functions or afterwards or never_runs or arrive"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PoolOfThreads", "ThreadEach"])
def test_the_backends_of_the_documentation_pass_the_suite(run, name):
    (block,) = [block for block in PROGRAMS if f"class {name}(" in block.text]
    (run.folder / "own.py").write_text(block.text.partition("\n\n\ndef run(")[0])
    (run.folder / "test_own.py").write_text(SUITE[0].text.replace("PoolOfThreads", name))
    printed = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", QUICK, "test_own.py")
    assert re.match(r"[7-9] passed|6 passed, 1 skipped", printed.splitlines()[-1]), printed


@pytest.mark.parametrize("block", QUOTED, ids=str)
def test_quotations_stand_where_they_say(block):
    """Every line, in order; ``...`` stands for some that are left out."""
    source = iter((ROOT / block.mark.removeprefix("from ")).read_text().splitlines())
    there = [line.strip() for line in source]
    place = 0
    for line in filter(None, map(str.strip, block.text.splitlines())):
        if line != "...":
            assert line in there[place:], line
            place = there.index(line, place) + 1


def test_shell_examples_run(run):
    shutil.copytree(ROOT / "examples", run.folder / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.db"))
    printed = [run("sh", "-c", line) for line in SHELL[0].text.splitlines()]
    assert "100 jobs in" in printed[0]
    assert "50 jobs in" in printed[1], "the resume runs what is missing"
    assert "demo" in printed[2]
    assert "done      150" in printed[3]
    assert len((run.folder / "results.csv").read_text().splitlines()) == 151
    assert "process" in printed[-1]


def test_the_main_job_of_the_readme_runs(run):
    """The first command, without the installation that is at its beginning."""
    (block,) = [block for block in blocks(ROOT / "README.md") if block.mark == "install and run"]
    assert len(block.text.splitlines()) == 1
    *installation, job = block.text.split(" && ")
    assert [step.split()[:3] for step in installation] == [
        ["python3", "-m", "venv"],
        [".venv/bin/pip", "install", "."],
    ]
    shutil.copytree(ROOT / "examples", run.folder / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.db"))
    assert "done      16" in run("sh", "-c", job.replace(".venv/bin/", ""))
    assert (run.folder / "evalkit.db").exists()


def test_the_test_command_of_the_readme_is_one_line():
    (block,) = [block for block in blocks(ROOT / "README.md") if block.mark == "test"]
    assert len(block.text.splitlines()) == 1
    assert "-r requirements-dev.txt" in block.text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_command_line_page_names_every_option_of_run():
    import typer

    from evalkit.cli.app import create_app

    page = (ROOT / "docs" / "cli.md").read_text()
    commands = typer.main.get_command(create_app()).commands
    for name in commands:
        assert f"`evalkit {name}" in page
    for parameter in commands["run"].params:
        if parameter.param_type_name == "option" and "--help" not in parameter.opts:
            assert any(option in page for option in parameter.opts), parameter.opts


def test_every_capability_is_documented():
    from dataclasses import fields

    from evalkit.backends import Capabilities

    page = (ROOT / "docs" / "backends.md").read_text()
    for field in fields(Capabilities):
        assert f"| `{field.name}` |" in page


def test_what_a_suite_may_set_is_documented():
    from evalkit.testing.backend_fixtures import BackendFixtures

    page = (ROOT / "docs" / "backends.md").read_text()
    settings = [name for name in BackendFixtures.__annotations__ if not name.startswith("_")]
    for name in (*settings, "create", "prepare", "command"):
        assert f"`{name}" in page, name
