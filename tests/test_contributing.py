"""CONTRIBUTING.md is enough: a backend made of nothing but its blocks is built, installed, listed, used and tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from installed import Installed

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
(PROGRAM,) = re.findall(r"^<!-- program -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)

#: A part of the suite that takes seconds; all of it passes.
_QUICK = "order_of_submission or batches_are_at_least or crashed_fails or kind_of_exception or lambdas or nothing_out"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("plugin") / "evalkit-pool"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "src" / "evalkit_pool" / "__init__.py").touch()
    return Installed(folder, folder.parent / "env")


def test_the_page_has_every_file_that_it_draws():
    assert set(FILES) == {
        "pyproject.toml",
        "src/evalkit_pool/plugin.py",
        "src/evalkit_pool/backend.py",
        "tests/test_pool.py",
    }


def test_the_plugin_is_installed_as_a_distribution_of_its_own(plugin):
    program = "import evalkit_pool; print(evalkit_pool.__file__)"
    where = plugin.run(str(plugin.python), "-c", program, cwd=plugin.folder.parent)
    assert where.startswith(str(plugin.python.parent.parent))


def test_evalkit_plugins_lists_it(plugin):
    rows = [line.split("\t") for line in plugin.run(str(plugin.python), "-m", "evalkit", "plugins").splitlines()]
    (row,) = [row for row in rows if row[0] == "pool"]
    assert row[1:] == [
        "backend",
        "evalkit-pool",
        "0.1.0",
        "isolates crashes, by value",
        "the process pool of the standard library",
    ]
    assert not [row for row in rows if row[1] == "broken"]


def test_the_program_runs_on_it(plugin):
    (plugin.folder / "program.py").write_text(PROGRAM)
    assert plugin.run(str(plugin.python), "program.py").strip() == "[0, 1, 4, 9, 16]"


def test_the_shell_runs_on_it_and_refuses_an_option_that_it_does_not_have(plugin):
    (plugin.folder / "work.py").write_text("def double(job):\n    return 2 * job['x']\n")
    run = [str(plugin.python), "-m", "evalkit", "run", "work.py:double", "--grid", "x=1,2,3", "-b", "pool", "-w", "1"]
    assert "done      3" in plugin.run(*run, "--option", "start_method=forkserver")
    with pytest.raises(AssertionError, match="did you mean 'start_method'"):
        plugin.run(*run, "--option", "start_methd=spawn")


@pytest.mark.slow
def test_its_suite_passes(plugin):
    closing = plugin.suite("-k", _QUICK)
    passed = re.match(r"(\d+) passed", closing)
    assert passed, closing
    assert int(passed[1]) >= 6
