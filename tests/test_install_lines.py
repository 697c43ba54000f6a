"""Every install line that code and pages print works, and none of them installs a stranger's distribution.

On the package index, ``evalkit`` is another project, and what this repository holds is not there at all.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import pytest
from install_lines import (
    MARK,
    OURS,
    PAGE,
    POOL,
    PROJECTS,
    REPOSITORY,
    REQUIREMENTS,
    ROOT,
    THEIRS,
    commands,
    refusal,
    refusal_of_dependency,
    refusal_of_file,
    texts,
    under,
)
from packaging.requirements import Requirement

from evalkit import __version__
from evalkit.builtin import KNOWN_BACKENDS

LINES = [
    *((PAGE, line, REPOSITORY) for line in commands(OURS)),
    *((PAGE, line, POOL) for line in commands(THEIRS)),
    *(
        (path, line, REPOSITORY)
        for path in under(
            *("*.md", "docs/**/*", "examples/**/*", "benchmarks/**/*", ".ci/*"),
            *("evalkit/**/*.py", "plugins/*/*.md", "plugins/*/src/**/*.py"),
        )
        if path != PAGE and path.suffix in {".md", ".py", ".txt", ".sh", ".slurm", ""}
        for text in texts(path)
        for line in commands(text)
    ),
]


def test_lines_are_found_in_pages_and_in_code():
    assert MARK
    found = {str(path.relative_to(ROOT)) for path, _, _ in LINES}
    assert {"README.md", "CONTRIBUTING.md", "docs/storage.md", "examples/hpc/README.md"} <= found
    assert {f"plugins/evalkit-{name}/README.md" for name in ("loky", "ray", "mpi")} <= found
    assert {"evalkit/builtin.py", "evalkit/storage/sql_engine.py", "examples/digits.py"} <= found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```sh\nvenv && .venv/bin/pip install . && run  # on a cluster\n```\n", ["."]),
        ("```sh\npip install -U x \\\n  y  # both\n```\n", ["-U x    y"]),
        ("type `pip\ninstall '.[a]'`, or\n`uv add b`", ["'.[a]'", "b"]),
        ("it needs c: pip install 'c>=1', or load its module", ["'c>=1'"]),
        ("again (in a clone: pip install .)", ["."]),
        ("pip install ", [""]),
    ],
)
def test_lines_are_read_as_they_are_typed(text, expected):
    assert list(commands(text)) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            "evalkit",
            "evalkit-core",
            "'evalkit[postgresql]'",
            "evalkit-redis",
            "Evalkit_Loky",
            "-e evalkit",
            "-U evalkit",
        ),
        *("./plugins/evalkit-redis", "plugins", "'.[redis]'", "./evalkit", "-r requirements.txt", ". evalkit-mpi", ""),
        *("nobody-knows-this", "git+https://example.org/x", "'loky @ https://example.org/x'", "--index-url x loky"),
    ],
)
def test_what_installs_a_stranger_or_nothing_is_refused(arguments):
    assert refusal(arguments, REPOSITORY) is not None


@pytest.mark.parametrize(
    ("path", "line", "folder"), LINES, ids=[f"{path.relative_to(ROOT)}: {line}" for path, line, _ in LINES]
)
def test_every_line_installs_what_it_says(path, line, folder):
    assert refusal(line, folder) is None, path


@pytest.mark.parametrize("path", sorted({path for path, _, _ in LINES if path.suffix == ".md"}), ids=str)
def test_a_page_that_installs_a_plugin_installs_the_core_with_it(path):
    """Else pip looks for the core on the package index, where it is not."""
    for line in (line for page, line, _ in LINES if page == path and re.search(r"(plugins|examples)/", line)):
        assert "." in shlex.split(line), line


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_files_of_requirements(name):
    assert refusal_of_file(name, REPOSITORY) is None


@pytest.mark.parametrize(
    "about", [*PROJECTS.values(), *POOL.projects.values()], ids=lambda about: about["project"]["name"]
)
def test_dependencies(about):
    extras = about["project"].get("optional-dependencies", {}).values()
    needed = [*about["build-system"]["requires"], *about["project"]["dependencies"], *chain(*extras)]
    assert [reason for text in needed if (reason := refusal_of_dependency(text))] == []
    is_core = about["project"]["name"] == "evalkit-core"
    assert is_core or "evalkit-core" in [Requirement(text).name for text in needed]


def test_the_distributions_are_named_as_their_folders():
    assert {".", "plugins/evalkit-loky", "plugins/evalkit-ray", "plugins/evalkit-mpi"} <= set(PROJECTS)
    for path, about in PROJECTS.items():
        assert about["project"]["name"] == (Path(path).name or "evalkit-core")


# -- what errors say --------------------------------------------------------------------------------------------------


def distribution(site: Path, name: str, version: str, entry_points: Mapping[str, str]) -> None:
    """What pip writes into ``site`` about a distribution."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{name} = {target}" for name, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[evalkit]", *lines, ""]))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """What the core needs, without plugins, engines and drivers."""
    folder = tmp_path_factory.mktemp("packages")
    left_out = ("evalkit", "_editable", "__editable__", "loky", "ray", "mpi4py", "psycopg")
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(path).iterdir():
            if not entry.name.lower().startswith(left_out):
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def python(packages, tmp_path):
    """Run Python on what the core needs and on these folders; return what it prints and what it complains about."""

    def python(*args: str, folders: Iterable[Path] = ()) -> tuple[str, str]:
        path = os.pathsep.join(map(str, [*folders, packages, ROOT]))
        done = subprocess.run(
            [sys.executable, "-S", *args],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, done.stderr

    return python


_ERRORS = """
    import json, sys
    from evalkit import Evaluator
    said = {}
    for method, storage in json.loads(sys.argv[1]):
        try:
            Evaluator.create(dict, method, {"storage": storage}).close()
        except Exception as exc:
            said[f"{method} {storage}"] = [type(exc).__name__, str(exc)]
    print(json.dumps(said))
"""


def errors(python, *cases: tuple[str, str], folders: Iterable[Path] = ()) -> list[list[str]]:
    """What ``create`` says to these methods and storages: the class and the message of each error."""
    printed, _ = python("-c", textwrap.dedent(_ERRORS), json.dumps(cases), folders=folders)
    said = json.loads(printed)
    assert list(said) == [f"{method} {storage}" for method, storage in cases]
    return list(said.values())


def line_of(message: str) -> str:
    (line,) = commands(message)
    assert refusal(line, REPOSITORY) is None, message
    return line


def test_a_plugin_of_this_repository_that_is_missing(python):
    said = errors(python, *((name, "memory://") for name in KNOWN_BACKENDS))
    assert {kind for kind, _ in said} == {"PluginNotInstalledError"}
    assert all("is not installed; in a clone of evalkit: pip install ./plugins/" in message for _, message in said)
    backends = {
        name: f"./{path}"
        for path, about in PROJECTS.items()
        if path.startswith("plugins/")
        for name in about["project"]["entry-points"]["evalkit"]
    }
    assert {name: line_of(message) for name, (_, message) in zip(KNOWN_BACKENDS, said, strict=True)} == backends


def test_a_plugin_whose_engine_is_missing(python, tmp_path):
    needed = {}
    for about in (about["project"] for path, about in PROJECTS.items() if path.startswith("plugins/")):
        distribution(tmp_path, about["name"], about["version"], about["entry-points"]["evalkit"])
        needed |= dict.fromkeys(about["entry-points"]["evalkit"], about["dependencies"])
    folders = [tmp_path, *ROOT.glob("plugins/*/src")]
    said = errors(python, *((name, "memory://") for name in needed), folders=folders)
    for dependencies, (kind, message) in zip(needed.values(), said, strict=True):
        assert kind == "BrokenPluginError"
        assert "ModuleNotFoundError: No module named" in message
        assert line_of(message).strip("'") in dependencies, "the same version as the plugin asks for"


def test_a_known_plugin_that_does_not_load_under_another_name(python, tmp_path):
    distribution(tmp_path, "evalkit-mpi", "0.1.0", {"renamed": "not_there"})
    ((kind, message),) = errors(python, ("mpicomm", "memory://"), folders=[tmp_path])
    assert kind == "BrokenPluginError"
    assert "renamed (evalkit-mpi 0.1.0), which does not load: ModuleNotFoundError" in message


@pytest.mark.parametrize("program", [None, "raise ImportError('no pq wrapper available')"])
def test_a_database_whose_driver_does_not_load(python, tmp_path, program):
    if program is not None:
        (tmp_path / "psycopg.py").write_text(program)
    ((kind, message),) = errors(python, ("serial", "postgresql://localhost/x"), folders=[tmp_path])
    assert kind == "PluginNotInstalledError"
    assert ("No module named 'psycopg'" if program is None else "no pq wrapper") in message
    assert [line_of(message).strip("'")] == PROJECTS["."]["project"]["optional-dependencies"]["postgresql"]


def test_a_storage_that_nobody_brings(python):
    said = errors(python, ("serial", "redis://localhost"), ("serial", "rediss://localhost"))
    for (kind, message), scheme in zip(said, ("redis", "rediss"), strict=True):
        assert kind == "StorageURLError"
        assert f"no storage for {scheme}:// is installed" in message
        assert "memory, null, postgresql, sqlite; a plugin may bring others" in message
        assert not list(commands(message))


def test_the_list_of_plugins_names_lines_that_work(python):
    printed, complaints = python("-m", "evalkit", "plugins")
    rows = {row[0]: row for row in (line.split("\t") for line in printed.splitlines())}
    assert all(rows[name][2] == "not installed" and line_of(rows[name][5]) for name in KNOWN_BACKENDS)
    assert rows["process"][2:4] == rows["sqlite://"][2:4] == ["evalkit-core", __version__]
    assert not complaints


def test_another_distribution_called_evalkit_does_not_confuse(python, tmp_path):
    distribution(tmp_path, "evalkit-core", __version__, {})
    distribution(tmp_path, "evalkit", "99.0", {})
    printed, _ = python("-m", "evalkit", "--version", folders=[tmp_path])
    assert printed == f"evalkit {__version__}\n"
    printed, complaints = python("-m", "evalkit", "plugins", folders=[tmp_path])
    assert f"process\tbackend\tevalkit-core\t{__version__}\t" in printed
    assert "evalkit 99.0 is installed here too" in " ".join(complaints.split())
    assert line_of(" ".join(complaints.split())) == "."
