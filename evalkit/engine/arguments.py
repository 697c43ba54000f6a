"""What users give to an evaluator: checked, and copied where it has to be."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from evalkit.backends.base import Backend
from evalkit.callbacks.base import Callback
from evalkit.errors import ParametersError
from evalkit.plugins import close_match, plugins
from evalkit.running import are_plain, own_copy
from evalkit.storage.base import Storage
from evalkit.storage.memory import MemoryStorage
from evalkit.usercode import attempt, describe_error, shown, type_name

__all__ = [
    "check_callbacks",
    "check_run_function",
    "check_seconds",
    "entries_of",
    "is_int",
    "make_backend",
    "open_storage",
    "parameters_of",
    "parameters_of_all",
]

_DICT, _STR = frozenset({dict}), frozenset({str})

#: What every method takes, beside the options of its backend.
_COMMON = (
    "num_workers",
    "callbacks",
    "run_function_kwargs",
    "storage",
    "search_id",
    "job_timeout",
    "resources",
    "retries",
    "grace",
    "output_timeout",
)


def parameters_of(args: Any, index: int) -> dict[str, Any]:
    """A copy of the parameters of one job, containers in containers included.

    Args:
        args: what should be a mapping.
        index: its place in what was submitted, for the error.

    Raises:
        ParametersError: it is no mapping, or has a name that is not a string.
    """
    if type(args) is not dict:
        given, error = attempt(_dict_of, args)
        if given is None:
            why = "" if error is None else f", which cannot be read: {describe_error(error)}"
            name = type_name(type(args)).removeprefix("builtins.")
            raise ParametersError(f"parameters are mappings; entry {index} is {name}: {shown(args, 200)}{why}")
        args = given
    for key in args:
        if not issubclass(type(key), str):
            raise ParametersError(f"the names of parameters are strings; entry {index} has {shown(key, 200)}")
    return own_copy(args)


def _dict_of(args: Any) -> dict[Any, Any] | None:
    return dict(args) if isinstance(args, Mapping) else None


def parameters_of_all(args_list: Sequence[Any]) -> list[dict[str, Any]]:
    """What :func:`parameters_of` makes of each of these; in one go where that is simple."""
    is_simple, _ = attempt(_are_dicts, args_list)
    if is_simple:
        return list(map(dict.copy, args_list)) if are_plain(args_list) else list(map(own_copy, args_list))
    return [parameters_of(args, index) for index, args in enumerate(args_list)]


def _are_dicts(args_list: Sequence[Any]) -> bool:
    return _DICT.issuperset(map(type, args_list)) and _STR.issuperset(map(type, chain.from_iterable(args_list)))


def entries_of(args_list: Any) -> Iterable[Any]:
    """What ``submit`` was given, if it is an iterable that can be of mappings.

    Raises:
        ParametersError: it is something else.
    """
    if isinstance(args_list, Mapping | str | bytes) or not isinstance(args_list, Iterable):
        raise ParametersError(
            f"submit takes an iterable of mappings, not {shown(args_list, 200)}; write submit([{{...}}])"
        )
    return args_list


def _options_of(backend_class: type[Backend]) -> list[str]:
    """The options of a backend: the keyword-only parameters of its ``__init__``."""
    parameters = inspect.signature(backend_class.__init__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def open_storage(storage: Storage | str | None) -> Storage:
    """The storage that an instance or a URL names; a new one in memory for None.

    Raises:
        TypeError: it is none of these.
        StorageError: it cannot be opened.
    """
    if storage is None:
        return MemoryStorage()
    if isinstance(storage, str):
        return plugins().open_storage(storage)
    if isinstance(storage, Storage):
        return storage
    raise TypeError(f"storage takes a Storage or a URL such as sqlite:///study.db, not {storage!r}")


def check_run_function(run_function: Any) -> None:
    """Raise TypeError if it cannot be called."""
    if not callable(run_function):
        raise TypeError(f"the run function must be callable, not {run_function!r}")


def check_callbacks(callbacks: Iterable[Callback] | None) -> list[Callback]:
    """The callbacks as a list; TypeError if they are not callbacks."""
    if callbacks is not None and not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks takes a list of instances of evalkit.Callback, not {callbacks!r}")
    checked = list(callbacks or ())
    for callback in checked:
        if not isinstance(callback, Callback):
            raise TypeError(f"a callback is an instance of evalkit.Callback, not {callback!r}")
    return checked


def check_seconds(name: str, value: Any, zero: bool = False) -> None:
    """Raise ValueError if it is no length of time. ``zero`` allows 0 and forbids None."""
    if value is None and not zero:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name} takes a positive number of seconds{'' if zero else ', or None'}, not {value!r}")


def is_int(value: Any) -> bool:
    """Whether it is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def make_backend(method: str, given: Mapping[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """Make the backend of that name with those of the keyword arguments that are its own. It is not started.

    Returns:
        the backend, and the other keyword arguments, which are the evaluator's.

    Raises:
        ValueError: an unknown method, a name that nobody takes (names the close match), or a number of workers that
            makes no sense.
    """
    backend_class = plugins().backend_class(method)
    accepted = _options_of(backend_class)
    for name in given:
        if name not in accepted and name not in _COMMON:
            candidates = sorted({*accepted, *_COMMON})
            raise ValueError(
                f"backend {method!r} has no option {name!r}{close_match(str(name), candidates)}; "
                f"it takes: {', '.join(candidates)}"
            )
    num_workers = backend_class.default_num_workers
    if "num_workers" in given:
        num_workers = given["num_workers"]
        if type(num_workers) is not int or num_workers < 1:
            raise ValueError(f"num_workers takes an int of at least 1, not {num_workers!r}")
    options = {name: given[name] for name in accepted if name in given}
    common = {name: given[name] for name in _COMMON if name in given and name != "num_workers"}
    # None goes to those only that have it as their default.
    return backend_class(num_workers, **options), common  # type: ignore[arg-type]
