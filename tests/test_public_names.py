"""The names that users import, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import evalkit

#: What users build on: a name goes only with a new major version.
PROMISED = {
    "Callback",
    "CancelOutcome",
    "ErrorInfo",
    "EvalkitError",
    "Evaluator",
    "Job",
    "JobCause",
    "JobState",
    "JobStatus",
    "RetryPolicy",
    "RunningJob",
    "__version__",
    "call_with_kwargs",
}

HEAVY = ("numpy", "sqlalchemy", "ray", "loky", "tqdm", "rich", "typer", "mpi4py", "pytest")


def test_the_promised_names_are_there() -> None:
    assert set(evalkit.__all__) >= PROMISED
    assert list(evalkit.__all__) == sorted(evalkit.__all__)


def _modules() -> list[str]:
    return sorted(
        module.name
        for module in pkgutil.walk_packages(evalkit.__path__, "evalkit.")
        if not module.name.endswith("__main__")
    )


@pytest.mark.parametrize("name", _modules())
def test_every_module_says_what_is_public(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and not exc.name.startswith("evalkit"):
            pytest.skip(f"needs {exc.name}")
        raise
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.__all__ names {public!r}, which is not there"


def test_importing_evalkit_brings_nothing_heavy() -> None:
    code = f"import sys, evalkit; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == []
    assert done.stderr == ""


def test_running_jobs_in_memory_brings_nothing_heavy() -> None:
    code = f"""
import sys
from evalkit import Evaluator
for method in ("serial", "thread", "process"):
    with Evaluator.create(dict, method) as evaluator:
        evaluator.submit([{{"x": 1}}])
        (job,) = evaluator.gather("ALL")
        assert job.output == {{"x": 1}}, job
print(*sorted({set(HEAVY)!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == [], done.stderr


def test_importing_evalkit_starts_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = """
import os, threading
before = set(os.listdir())
import evalkit
assert threading.active_count() == 1
assert set(os.listdir()) == before
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


PLUGINS = sorted((Path(__file__).parent.parent / "plugins").glob("*/src/*/*.py"))


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_plugins_use_public_names_only(path: Path) -> None:
    """What a stranger's plugin could not rely on, ours do not use: only what is in ``__all__`` of what is documented
    for authors.
    """
    doors = {"evalkit", "evalkit.backends", "evalkit.errors", "evalkit.hookspecs", "evalkit.storage", "evalkit.testing"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "evalkit":
            assert node.module in doors, f"{path}:{node.lineno}"
            assert {alias.name for alias in node.names} <= set(importlib.import_module(node.module).__all__)
        elif isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.partition(".")[0] == "evalkit"], path
