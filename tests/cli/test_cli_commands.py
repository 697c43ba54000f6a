from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def test_ls_and_show_and_export(shell):
    shell("run", "work.py:troubled", "--grid", "x=1,3,5", "-w", "1", "--search", "s", "--minimize", code=1)
    header, row = shell("ls").stdout.splitlines()
    assert header.split("\t")[:3] == ["search", "created", "jobs"]
    assert row.split("\t")[0] == "s"
    shown = shell("show", "s", "-n", "1").stdout
    for words in ("target     work.py:troubled", "best      5", "EXCEPTION 1", "F_three 1", "s.2\tDONE\t5"):
        assert words in shown
    shell("export", "s", "--output", "e.csv")
    first = (shell.folder / "e.csv").read_text()
    assert [line.split(",")[:2] for line in first.splitlines()[1:]] == [
        ["1", "F_EXCEPTION"],
        ["3", "F_three"],
        ["5", "5"],
    ]
    shell("export", "s", "--output", "e.csv")
    assert (shell.folder / "e.csv").read_text() == first  # replaced, not appended
    assert sorted(path.name for path in shell.folder.glob("*e.csv*")) == ["e.csv"]


def test_what_is_not_there_is_told_and_not_created(shell):
    assert "there is no database" in shell("ls", code=2).stderr
    assert not (shell.folder / "evalkit.db").exists()
    shell("run", "work.py:square", "--grid", "x=1", "-b", "serial", "--search", "sweep")
    for command in (("show", "swep"), ("export", "swep", "--output", "e.csv")):
        assert "did you mean 'sweep'?" in shell(*command, code=2).stderr
    assert "not a" in shell("ls", "--storage", "sqlite:///work.py", code=2).stderr
    assert not (shell.folder / "e.csv").exists()


def test_large_searches_are_read_in_pages(shell):
    (shell.folder / "quick.py").write_text("def run(job):\n    return job['x']\n")
    (shell.folder / "p.jsonl").write_text("".join(f'{{"x": {number}}}\n' for number in range(9000)))
    shell("run", "quick.py:run", "--params", "p.jsonl", "-w", "2", "--search", "s", "-q")
    assert [job["objective"] for job in shell.exported("s")] == list(range(9000))


def plugin(shell, name: str, code: str) -> None:
    """A distribution of that name, with the module as its plugin."""
    site = shell.folder / "site"
    info = site / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[evalkit]\n{name} = {name}\n")
    (site / f"{name}.py").write_text(code)
    shell.environment["PYTHONPATH"] += f":{site}"


def test_plugins_are_listed_and_broken_ones_explained(shell):
    plugin(shell, "wonky", "raise RuntimeError('out of order')\n")
    rows = [line.split("\t") for line in shell("plugins").stdout.splitlines()]
    table = {row[0]: row for row in rows[1:]}
    assert table["process"][1:3] == ["backend", "evalkit-core"]
    assert "kills running" in table["process"][4]
    assert table["wonky"] == ["wonky", "broken", "wonky", "1.2", "", "RuntimeError: out of order"]
    process = shell.start("plugins", "--traceback")
    assert 'wonky.py", line 1' in process.communicate(timeout=300)[1]


def test_plugins_add_commands_and_break_none(shell):
    head = "from evalkit.hookspecs import hookimpl\n@hookimpl\ndef evalkit_cli(app):\n"
    plugin(shell, "greeter", head + "    @app.command()\n    def hello():\n        print('hello from a plugin')\n")
    plugin(shell, "raiser", head + "    raise RuntimeError('no commands today')\n")
    plugin(shell, "thief", head + "    @app.command('ls')\n    def mine():\n        print('stolen')\n")
    done = shell("hello")
    assert done.stdout == "hello from a plugin\n"
    assert "no commands today" in done.stderr
    assert "cannot replace the command ls" in done.stderr
    shell("ls", code=2)


def test_export_tells_what_it_leaves_out(invoke):
    from evalkit.storage import SQLStorage

    storage = SQLStorage.from_url("sqlite:///evalkit.db")
    storage.create_search("s")
    storage.create_jobs("s", [{"x": 1}, {"x": 2}])
    storage.close()
    result = invoke("export", "s", "--output", "e.jsonl")
    assert "0 jobs written" in result.stderr
    assert "2 that were cancelled or have not ended are left out" in result.stderr
    assert invoke("export", "s", "--output", "e.jsonl", "--all").exit_code == 0
    with open("e.jsonl") as file:
        assert [json.loads(line)["state"] for line in file] == ["QUEUED", "QUEUED"]
    assert "not ended  2" in invoke("show", "s").stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_output_that_cannot_be_written_is_one_line(shell):
    shell("run", "work.py:square", "--grid", "x=1", "-b", "serial", "-q")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "evalkit", "ls"]
        done = subprocess.run(
            command, cwd=shell.folder, env=shell.environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.strip() == "error: the output cannot be written: No space left on device"


def test_what_no_terminal_can_show_is_escaped(shell):
    (shell.folder / "p.jsonl").write_text('{"x": 1, "name": "\\ud800"}\n')
    shell("run", "work.py:square", "--params", "p.jsonl", "-b", "serial", "-q", "--search", "s")
    assert "\\ud800" in shell("show", "s").stdout
