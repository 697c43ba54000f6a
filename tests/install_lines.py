"""Reads install lines where they stand, and says what is wrong with one."""

from __future__ import annotations

import ast
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from evalkit import __version__

__all__ = [
    "MARK",
    "OURS",
    "PAGE",
    "POOL",
    "PROJECTS",
    "REPOSITORY",
    "REQUIREMENTS",
    "ROOT",
    "THEIRS",
    "commands",
    "refusal",
    "refusal_of_dependency",
    "refusal_of_file",
    "texts",
    "under",
]

ROOT = Path(__file__).resolve().parent.parent

#: What may be installed from the package index.
THIRD_PARTY = {
    *("cloudpickle", "pluggy", "psutil", "psycopg", "rich", "sqlalchemy", "tqdm", "typer"),
    *("distributed", "loky", "mpi4py", "mpich", "ray"),
    *(
        "hatchling",
        "hypothesis",
        "import-linter",
        "joblib",
        "mypy",
        "numpy",
        "pandas",
        "pgserver",
        "pytest",
        "pytest-timeout",
    ),
    *("pytest-xdist", "ruff", "scikit-learn", "types-psutil", "types-tqdm"),
}

_COMMAND = re.compile(r"\b(?:pip3?|pipx|uv(?: pip| tool)?)\s+(?:install|add|download|wheel)\b[ \t]*([^\n]*)")
_FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`+([^`]+)`+")
_FLAGS = {"-U", "--upgrade", "-q", "--quiet"}


@dataclass(frozen=True)
class Folder:
    """Where a line is typed.

    Attributes:
        name: of the distribution that the folder is; those below it are named as their own folders.
        projects: path -> the pyproject.toml of each distribution.
        requirements: path -> the text of each file of requirements.
    """

    name: str
    projects: Mapping[str, Mapping[str, Any]]
    requirements: Mapping[str, str] = field(default_factory=dict)


def project(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def under(*patterns: str) -> list[Path]:
    """The files of the repository, without those of environments and of builds in it."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    left_out = {".venv", "build", "dist", "__pycache__", "site-packages"}
    return sorted(path for path in found if not left_out.intersection(path.relative_to(ROOT).parts))


PROJECTS = {str(path.parent.relative_to(ROOT)): project(path) for path in under("pyproject.toml", "*/*/pyproject.toml")}
REQUIREMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in under("*.txt", "*/*/*.txt")}
REPOSITORY = Folder("evalkit-core", PROJECTS, REQUIREMENTS)

# The plugin of CONTRIBUTING.md: what the page shows after its files is typed in their folder.
PAGE = ROOT / "CONTRIBUTING.md"
OURS, MARK, THEIRS = PAGE.read_text().partition("<!-- file: pyproject.toml -->")
POOL = Folder("evalkit-pool", {".": tomllib.loads(_FENCE.findall(THEIRS)[0])})


def commands(text: str) -> Iterator[str]:
    """What is written after ``pip install``, in code first and then in prose."""
    yield from _typed("\n".join(_FENCE.findall(text)))
    text = _FENCE.sub("", text)
    yield from _typed("\n".join(" ".join(span.split()) for span in _SPAN.findall(text)))
    for paragraph in _SPAN.sub("", text).split("\n\n"):
        for arguments in _COMMAND.findall(" ".join(paragraph.split())):
            yield re.split(r'[,;:)](?:\s|$)|"| #| && ', arguments)[0].strip()


def _typed(text: str) -> Iterator[str]:
    for arguments in _COMMAND.findall(text.replace("\\\n", " ")):
        yield re.split(r'\s#| && |[;|]|"[,)]', arguments)[0].strip()


def texts(path: Path) -> Iterator[str]:
    """The strings of a module, else the whole file as lines to be typed, or as a page."""
    text = path.read_text()
    if path.suffix == ".py":
        strings = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
        yield from (value for value in strings if isinstance(value, str))
    else:
        yield text if path.suffix == ".md" else f"```\n{text}\n```"


def refusal(arguments: str, folder: Folder) -> str | None:
    """Why this is not to be given to ``pip install``, or None."""
    words = iter(shlex.split(arguments))
    targets = 0
    for word in words:
        if word in _FLAGS:
            continue
        targets += 1
        if word in {"-r", "--requirement"}:
            reason = refusal_of_file(next(words, ""), folder)
        else:
            reason = _refusal_of_target(next(words, "") if word in {"-e", "--editable"} else word, folder)
        if reason is not None:
            return reason
    return None if targets else "installs nothing"


def refusal_of_file(name: str, folder: Folder) -> str | None:
    if name not in folder.requirements:
        return f"no file {name!r}"
    lines = (re.split(r"(?:^|\s)#", line)[0].strip() for line in folder.requirements[name].splitlines())
    for line in filter(None, lines):
        reason = refusal(line if line.startswith("-") else shlex.quote(line), folder)
        if reason is not None:
            return f"{name}: {line}: {reason}"
    return None


def _refusal_of_target(target: str, folder: Folder) -> str | None:
    if not (target.startswith(".") or "/" in target):
        return _refusal_of_name(target)
    path, extras = re.fullmatch(r"([^\[]*)(?:\[(.*)\])?", target).groups()
    path = os.path.normpath(path)
    if path not in folder.projects:
        return f"no distribution in {path!r}"
    about = folder.projects[path]["project"]
    if about["name"] != (Path(path).name or folder.name):
        return f"{path!r} holds {about['name']!r}"
    unknown = set(filter(None, (extras or "").split(","))) - set(about.get("optional-dependencies", {}))
    return f"{path!r} has no extra {unknown}" if unknown else None


def _refusal_of_name(text: str) -> str | None:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as exc:
        return f"not a requirement: {exc}"
    name = canonicalize_name(requirement.name)
    if name == "evalkit" or name.startswith("evalkit-"):
        return f"{name!r} is not on the package index, or is a stranger's there"
    return None if name in THIRD_PARTY and requirement.url is None else f"{text!r} is not among what is known"


def refusal_of_dependency(text: str) -> str | None:
    """As of a name; but a plugin depends on evalkit-core, of this version and not of any."""
    requirement = Requirement(text)
    if requirement.name != "evalkit-core":
        return _refusal_of_name(text)
    if not requirement.specifier.contains(__version__) or requirement.specifier.contains("999"):
        return f"{text!r} is to take {__version__}, and not every later version"
    return None
