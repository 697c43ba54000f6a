"""Plugins: found by entry point, loaded on use, and apart from one another when broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import BrokenPluginError, PluginError, PluginNotInstalledError, StorageURLError, UnknownPluginError
from evalkit.plugins import close_match, plugins

ROOT = Path(__file__).parents[1]

BACKEND = """
    from evalkit import RunningJob
    from evalkit.backends.asynchronous import AsyncBackend

    class Shouting(AsyncBackend):
        def __init__(self, num_workers, *, loudness=1):
            super().__init__(num_workers)
            self.loudness = loudness

        async def execute(self, job: RunningJob):
            return self.run_function(job) * self.loudness
"""

HOOK = "from evalkit.hookspecs import BackendSpec, hookimpl\n@hookimpl\n"

STORAGE = """
    from evalkit.storage.memory import MemoryStorage

    class Notes(MemoryStorage):
        @classmethod
        def from_url(cls, url):
            print("opened", url)
            return cls()
"""

PLUGIN = """
    from evalkit.hookspecs import BackendSpec, StorageSpec, hookimpl

    @hookimpl
    def evalkit_backends():
        return [
            BackendSpec("shout", "shouting.backend:Shouting", install="pip install shouting", summary="loud"),
            BackendSpec("nowhere", "shouting.missing:Backend", install="pip install 'shouting[missing]'"),
            BackendSpec("wrong", "shouting.plugin:hookimpl"),
        ]

    @hookimpl
    def evalkit_storages():
        return [StorageSpec("shout", "shouting.storage:Notes")]

    @hookimpl
    def evalkit_evaluator_created(evaluator):
        print("created", evaluator.num_workers)
"""


def install(site: Path, name: str, modules: dict[str, str], entry_points: dict[str, str], version: str = "1.2") -> None:
    """Install a distribution: a package, and what pip would write beside it."""
    package = site / name
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for module, text in modules.items():
        (package / f"{module}.py").write_text(textwrap.dedent(text))
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{entry} = {target}" for entry, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[evalkit]", *lines, ""]))
    (info / "RECORD").touch()


def run(site: Path, code: str) -> str:
    """Run a script where these distributions are installed; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def errors(site: Path, *methods: str) -> dict[str, list[str]]:
    """What ``create`` says to these methods: method -> class and message of the error."""
    code = f"""
        import json
        from evalkit import Evaluator
        said = {{}}
        for method in {methods!r}:
            try:
                Evaluator.create(dict, method).close()
            except ValueError as exc:
                said[method] = [type(exc).__name__, str(exc)]
        print(json.dumps(said))
    """
    said: dict[str, list[str]] = json.loads(run(site, code).splitlines()[-1])
    return said


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A place with one sound third-party distribution."""
    modules = {"plugin": PLUGIN, "backend": BACKEND, "storage": STORAGE}
    install(tmp_path, "shouting", modules, {"shouting": "shouting.plugin"})
    return tmp_path


def test_a_third_partys_backend_and_storage(site: Path) -> None:
    out = run(
        site,
        """
        import sys
        from evalkit import Evaluator
        from evalkit.plugins import plugins

        assert plugins().broken == []
        spec, origin = plugins().backends["shout"]
        assert "shouting.backend" not in sys.modules, "nothing is imported before it is used"
        print(spec.summary, origin.distribution, origin.version, origin.name)
        options = {"num_workers": 3, "loudness": 3, "storage": "shout+loud://here"}
        with Evaluator.create(lambda job: job["x"], "shout", options) as evaluator:
            evaluator.submit([{"x": "a"}])
            print(evaluator.gather("ALL")[0].output)
        """,
    )
    assert out.splitlines() == ["loud shouting 1.2 shouting", "opened shout+loud://here", "created 3", "aaa"]


def test_options_of_a_third_partys_backend_are_checked(site: Path) -> None:
    out = run(
        site,
        """
        from evalkit import Evaluator
        try:
            Evaluator.create(dict, "shout", {"loudnes": 3})
        except ValueError as exc:
            print(exc)
        """,
    )
    assert "backend 'shout' has no option 'loudnes', did you mean 'loudness'?" in out


def test_what_does_not_load_says_so_when_it_is_used(site: Path) -> None:
    said = errors(site, "nowhere", "wrong", "shot", "serial")
    assert said["nowhere"][0] == "BrokenPluginError"
    assert "shouting.missing" in said["nowhere"][1]
    assert "pip install 'shouting[missing]'" in said["nowhere"][1]
    assert said["wrong"][0] == "BrokenPluginError"
    assert "not a subclass of Backend" in said["wrong"][1]
    assert "did you mean 'shout'?" in said["shot"][1]
    assert "serial" not in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("def broken(:", "SyntaxError"),
        (
            HOOK + "def evalkit_backend():\n    return []\n",
            "evalkit_backend",
        ),
        (
            HOOK + "def evalkit_backends():\n    raise OSError('not now')\n",
            "OSError: not now",
        ),
        (
            HOOK + "def evalkit_backends():\n    return ['name']\n",
            "expected a BackendSpec",
        ),
        (
            HOOK + "def evalkit_backends(evaluator):\n    return []\n",
            "evaluator",
        ),
        (
            HOOK + "def evalkit_backends():\n    return [BackendSpec('fresh', 'x:y'), BackendSpec('process', 'x:y')]\n",
            "'process' is already provided by evalkit-core",
        ),
    ],
    ids=["import", "exit", "syntax", "misspelt hook", "raises", "no spec", "wrong argument", "name taken"],
)
def test_a_broken_plugin_is_kept_apart(site: Path, text: str, words: str) -> None:
    install(site, "afflicted", {"plugin": text}, {"afflicted": "afflicted.plugin"}, version="0.3")
    out = run(
        site,
        """
        from evalkit import Evaluator
        from evalkit.plugins import plugins

        (broken,) = plugins().broken
        print(broken.origin.name, broken.origin.distribution, broken.origin.version)
        print(broken.reason.replace(chr(10), " "))
        assert broken.traceback
        assert "fresh" not in plugins().backends, "whole or not at all"
        for method in ("serial", "shout"):
            with Evaluator.create(lambda job: job["x"], method) as evaluator:
                evaluator.submit([{"x": "a"}])
                assert evaluator.gather("ALL")[0].output == "a"
        """,
    )
    first, reason, *_ = out.splitlines()
    assert first == "afflicted afflicted 0.3"
    assert words in reason
    said = errors(site, "afflicted", "unheard_of")
    assert said["afflicted"][0] == "BrokenPluginError"
    assert said["unheard_of"][0] == "UnknownPluginError"
    assert "afflicted" in said["unheard_of"][1], "the name may be one that the broken plugin would have given"


def test_of_two_plugins_that_bring_one_name_the_first_keeps_it(site: Path) -> None:
    install(site, "zzz_copy", {"plugin": PLUGIN, "backend": BACKEND}, {"copy": "zzz_copy.plugin"})
    out = run(
        site,
        """
        from evalkit.plugins import plugins
        print(len(plugins().broken), plugins().broken[0].reason)
        print(plugins().backends["shout"][1].distribution in ("shouting", "zzz_copy"))
        """,
    )
    assert out.startswith("1 ValueError: the backend 'shout' is already provided by")
    assert out.splitlines()[-1] == "True"


def test_a_hook_that_raises_when_an_evaluator_is_created_is_logged(site: Path) -> None:
    text = HOOK + "def evalkit_evaluator_created(evaluator):\n    1 / 0\n"
    install(site, "grumpy", {"plugin": text}, {"grumpy": "grumpy.plugin"})
    out = run(
        site,
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout)
        from evalkit import Evaluator
        Evaluator.create(dict).close()
        """,
    )
    assert "grumpy" in out
    assert "ZeroDivisionError" in out
    assert "created 1" in out, "the others are called"


def test_the_built_ins_come_in_through_the_same_door() -> None:
    found = plugins()
    assert {"serial", "thread", "process"} <= set(found.backends)
    assert {"memory", "null", "sqlite", "postgresql"} <= set(found.storages)
    assert {found.backends[name][1].distribution for name in ("serial", "thread", "process")} == {"evalkit-core"}
    assert plugins() is found


@pytest.mark.parametrize("name", ["SERIAL", "seriall", "multiprocessing"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnknownPluginError, match=name) as caught:
        plugins().backend_class(name)
    assert isinstance(caught.value, PluginError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("url", ["study.db", "", "://", "/tmp/x", "sqlite", "nothing://x", "sqlit:///x"])
def test_urls_that_name_no_storage(url: str) -> None:
    with pytest.raises(StorageURLError):
        plugins().open_storage(url)


@pytest.mark.parametrize(("name", "hint"), [("proces", ", did you mean 'process'?"), ("zzz", "")])
def test_close_matches(name: str, hint: str) -> None:
    assert close_match(name, ["process", "serial"]) == hint


def test_errors_of_plugins_carry_the_culprit() -> None:
    errors: list[Any] = [UnknownPluginError, PluginNotInstalledError, BrokenPluginError]
    for error in errors:
        assert error("words", "ray").plugin == "ray"
