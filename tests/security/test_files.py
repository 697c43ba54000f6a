"""Files that evalkit makes: nobody else can read what is temporary, nor have it written to another place."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from victim import with_pool, with_two

from evalkit import Evaluator, Job
from evalkit.callbacks import CSVCallback
from evalkit.cli.app import create_app
from evalkit.cli.rescue import rescue, resume_line


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty temporary folder, in which new files are open to all unless their maker sees to it."""
    with tempfile.TemporaryDirectory(prefix="ek-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        before = os.umask(0)
        yield Path(folder)
        os.umask(before)


def closed_to_others(path: Path) -> bool:
    return not stat.S_IMODE(path.lstat().st_mode) & 0o077


@pytest.mark.parametrize("method", ["thread", "process", "loky", pytest.param("ray", marks=pytest.mark.slow), "pool"])
def test_temporary_files_are_closed_to_others_and_gone_at_the_end(
    method: str, start: Callable[..., Any], temporary: Path
) -> None:
    if method in ("loky", "ray"):
        pytest.importorskip(f"evalkit_{method}")
    program = start(with_pool("spawn") if method == "pool" else with_two(method))
    assert [path for path in temporary.iterdir() if not closed_to_others(path)] == []
    program.finish()
    assert list(temporary.iterdir()) == []


def done(folder: Path) -> list[Job]:
    (folder / "work.py").write_text("def run(job):\n    return job['x']\n")
    (folder / "x.csv").write_text("x\n1\n2\n")
    with Evaluator.create(lambda job: job["x"], "serial") as evaluator:
        evaluator.submit([{"x": 1}, {"x": 2, "y": 3}])
        return evaluator.gather("ALL")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_users_name_follows_their_umask(tmp_path: Path, umask: int) -> None:
    done(tmp_path)
    command = [sys.executable, "-m", "evalkit", "run", "work.py:run", "--params", "x.csv", "--backend", "serial"]
    for output in ("out.csv", "out.jsonl"):
        subprocess.run([*command, "--output", output], cwd=tmp_path, umask=umask, check=True, capture_output=True)
    for name in ("evalkit.db", "out.csv", "out.jsonl"):
        assert oct(stat.S_IMODE((tmp_path / name).stat().st_mode)) == oct(0o666 & ~umask), name


def test_a_link_that_somebody_puts_beside_a_csv_file_is_not_followed(tmp_path: Path) -> None:
    first, second = done(tmp_path)
    mine = tmp_path / "mine"
    mine.write_text("precious")
    callback = CSVCallback(tmp_path / "results.csv")
    callback.on_done(first)
    (tmp_path / ".results.csv.tmp").symlink_to(mine)
    with contextlib.suppress(FileExistsError):
        callback.on_done(second)  # it has a column more, so the file is written anew
    assert mine.read_text() == "precious"
    (tmp_path / ".results.csv.tmp").unlink(missing_ok=True)
    callback.on_close()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


def test_a_link_that_somebody_puts_beside_an_export_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "evalkit", "run", "work.py:run", "--params", "x.csv", "--backend", "serial"]
    subprocess.run([*command, "--search", "s"], check=True, capture_output=True)
    mine = tmp_path / "mine.csv"
    mine.touch()
    (tmp_path / f".{os.getpid()}.out.csv").symlink_to(mine)
    result = CliRunner().invoke(create_app(), ["export", "s", "--output", "out.csv"])
    assert result.exit_code == 0, result.output
    assert mine.read_bytes() == b""
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
    assert not list(tmp_path.glob(".evalkit-*"))


def test_unsaved_results_go_to_a_new_file_that_is_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    jobs = done(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(os, "getcwd", lambda: str(gone))
    rescue("s", jobs)
    (file,) = temporary.iterdir()
    assert closed_to_others(file)
    assert len(file.read_text().splitlines()) == 2


def test_the_command_to_resume_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--storage", "postgresql://me:sesame@host/db"], ["--storage=postgresql:///db?password=sesame"]):
        monkeypatch.setattr(sys, "argv", ["evalkit", "run", "work.py", *words, "--workers", "2"])
        line = resume_line("s", "postgresql+psycopg://me:***@host/db", named=False, resumed=False)
        assert "sesame" not in line
        assert "postgresql+psycopg://me:***@host/db" in line
        assert line.endswith("--workers 2 --search s --resume")
