"""TARGET: from ``path/to/file.py:function`` or ``package.module:function`` to the function."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import cloudpickle

from evalkit.backends.importing import importing_function
from evalkit.errors import TargetError
from evalkit.plugins import close_match

__all__ = ["load_target", "takes_one_argument", "user_traceback"]

_SYNTAX = "write path/to/file.py:function or package.module:function"
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def load_target(spec: str) -> Callable[..., Any]:
    """Import the function that ``spec`` names, in such a way that worker processes find it too.

    A file's folder goes to the front of ``sys.path``, as ``python file.py`` has it, and the file is imported under its
    own name, so that it travels by reference. If that is the name of another module (``random.py``), or not a name that
    can be imported, it is loaded under a name of its own, its functions travel by value, and its folder goes to the end
    of ``sys.path``, where it hides nothing. For a module, the current folder is at the front, as ``python -m`` has it.

    Raises:
        TargetError: it does not lead to a callable. If its module cannot be imported, ``__cause__`` is what it raised;
            :func:`user_traceback` shows that as its author wants to see it.
    """
    place, separator, path = spec.rpartition(":")
    if not separator or not place or not path or "/" in path:
        whole = spec.removesuffix(":")
        raise TargetError(f"{spec!r} names no function: {_SYNTAX}" + (f", such as {whole}:run" if whole else ""))
    is_file = place.endswith(".py") or os.sep in place
    with importing_function():
        module = _import_file(place) if is_file else _import_module(place)
    found: Any = module
    walked = place
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            names = [known for known in dir(found) if not known.startswith("__")]
            raise TargetError(f"there is no {name!r} in {walked}{close_match(name, names)}") from None
        walked = f"{walked}:{name}" if walked is place else f"{walked}.{name}"
    if not callable(found):
        raise TargetError(f"{walked} is {type(found).__name__}, not something that can be called")
    return found  # type: ignore[no-any-return]  # callable() says so


def takes_one_argument(fn: Callable[..., Any]) -> bool:
    """Whether ``fn(job)`` can be called, as far as its signature tells."""
    try:
        inspect.signature(fn).bind(None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def user_traceback(exc: BaseException) -> str:
    """The traceback of an exception without the frames of evalkit and of the import system."""
    whole = traceback.TracebackException.from_exception(exc)
    seen: set[int] = set()
    parts: list[traceback.TracebackException | None] = [whole]
    while parts:
        part = parts.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        part.stack = traceback.StackSummary.from_list([frame for frame in part.stack if not _is_ours(frame.filename)])
        parts += [part.__cause__, part.__context__]
    return "".join(whole.format()).rstrip()


def _is_ours(filename: str) -> bool:
    machinery = filename.startswith("<frozen importlib") or filename == importlib.__file__
    return machinery or filename.startswith(_PACKAGE + os.sep)


def _import_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        folder, name = os.path.split(path)
        there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        close = difflib.get_close_matches(name, [one for one in there if one.endswith(".py")], n=1)
        hint = f", did you mean {os.path.join(folder, close[0])!r}?" if close else ""
        raise TargetError(f"there is no file {path!r}{hint}")
    if not path.endswith(".py"):
        raise TargetError(f"{path!r} is not a Python file: {_SYNTAX}")
    path = os.path.realpath(path)
    folder, stem = os.path.dirname(path), os.path.basename(path)[: -len(".py")]
    if "." in stem or _is_taken(stem, path):
        sys.path.append(folder)
        return _load_apart(path, stem)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return _imported(stem, path)


def _is_taken(name: str, path: str) -> bool:
    """Whether another module than the file at ``path`` has that name: built in, installed or loaded."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return True
    return spec is not None and (spec.origin is None or os.path.realpath(spec.origin) != path)


def _load_apart(path: str, stem: str) -> ModuleType:
    digest = hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()
    name = f"_evalkit_target_{stem.replace('.', '_')}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"{path!r} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        del sys.modules[name]
        raise TargetError(f"{path} cannot be imported: {type(exc).__name__}") from exc
    cloudpickle.register_pickle_by_value(module)
    return module


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{name!r} is not the name of a module: {_SYNTAX}")
    here = os.getcwd()
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    return _imported(name, name)


def _imported(name: str, shown: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        # Is it this module that is missing, or one that it imports?
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            raise TargetError(
                f"there is no module {exc.name!r}, neither in {os.getcwd()} nor installed; {_SYNTAX}"
            ) from None
        raise TargetError(f"{shown} cannot be imported: {type(exc).__name__}") from exc
    except (Exception, SystemExit) as exc:
        raise TargetError(f"{shown} cannot be imported: {type(exc).__name__}") from exc
