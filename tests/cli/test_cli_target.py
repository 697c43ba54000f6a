from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("work.py", "names no function"),
        ("work.py:", "names no function"),
        ("wrk.py:square", "did you mean 'work.py'"),
        ("work.py:sqare", "did you mean 'square'"),
        ("work.py:math", "is module, not something that can be called"),
        ("work.py:multiply", "add --kwargs"),
        ("no_such_module:run", "there is no module 'no_such_module'"),
        ("json:dumpz", "did you mean 'dump"),
        ("a-b:run", "not the name of a module"),
    ],
)
def test_a_target_that_leads_nowhere_is_bad_usage(invoke, target, message):
    if target == "work.py:multiply":
        with open("work.py", "a") as file:
            file.write("\ndef multiply(x, y): ...\n")
    result = invoke("run", target, "--grid", "x=1", "--storage", "null://")
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_import_error_shows_the_users_own_frames(shell):
    (shell.folder / "broken.py").write_text("import helper\n")
    (shell.folder / "helper.py").write_text("def check():\n    return 1 / 0\ncheck()\n")
    err = shell("run", "broken.py:run", "--grid", "x=1", "--storage", "null://", code=2).stderr
    assert 'broken.py", line 1' in err
    assert 'helper.py", line 2' in err
    assert "ZeroDivisionError" in err
    assert "importlib" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [("import sys; sys.exit(3)", "SystemExit"), ("def run(:", "SyntaxError"), ("import no_such", "no_such")],
)
def test_a_module_that_does_not_import_is_bad_usage(shell, content, message):
    (shell.folder / "broken.py").write_text(content)
    assert message in shell("run", "broken.py:run", "--grid", "x=1", "--storage", "null://", code=2).stderr


def test_a_file_finds_its_siblings_and_workers_find_it(shell):
    folder = shell.folder / "deep"
    folder.mkdir()
    (folder / "task.py").write_text("import sibling\ndef run(job):\n    return sibling.FACTOR * job['x']\n")
    (folder / "sibling.py").write_text("FACTOR = 10\n")
    shell("run", "deep/task.py:run", "--grid", "x=1,2", "--search", "s", "-w", "2")
    assert sorted(job["objective"] for job in shell.exported("s")) == [10, 20]


def test_a_file_named_as_a_module_of_the_library_hides_nothing(shell):
    """random.py: loaded apart, sent by value, and the library's random goes on working, in workers too."""
    (shell.folder / "random.py").write_text(
        "import sibling, tempfile\n"
        "FACTOR = 3\n"
        "def helper(x):\n    return FACTOR * x\n"
        "def run(job):\n    import random\n    return helper(job['x']) + 0 * random.Random(1).random() + sibling.ONE\n"
    )
    (shell.folder / "sibling.py").write_text("ONE = 1\n")
    (shell.folder / "elsewhere").mkdir()
    environment, shell.folder = shell.folder, shell.folder / "elsewhere"
    shell("run", "../random.py:run", "--grid", "x=1,2", "--search", "s", "-w", "2")
    assert sorted(job["objective"] for job in shell.exported("s")) == [4.0, 7.0]
    shell.folder = environment


def test_modules_and_dotted_names(shell):
    package = shell.folder / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tasks.py").write_text("class Task:\n    @staticmethod\n    def run(job):\n        return job['x']\n")
    shell("run", "pkg.tasks:Task.run", "--grid", "x=1,2", "--search", "s", "-w", "1")
    assert [job["objective"] for job in shell.exported("s")] == [1, 2]
