"""RunningJob: what the run function holds while it runs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any, Protocol

from evalkit.usercode import attempt, text_of

__all__ = [
    "SCALARS",
    "Channel",
    "RunningJob",
    "are_plain",
    "call_with_kwargs",
    "is_coroutine_function",
    "own_copy",
]

#: The types of plain values, which nobody can change and every way of travelling takes as they are.
SCALARS = frozenset({bool, float, int, str, type(None)})
# By the ids of types, since a metaclass may have a __hash__ of its own.
_SCALARS = frozenset(map(id, SCALARS))
_CONTAINERS = frozenset(map(id, (dict, list, set, tuple)))


class Channel(Protocol):
    """The way back from a running job to its evaluator, whatever lies between."""

    def progress(self, job_id: str, progress: float, phase: str) -> None: ...

    def record(self, job_id: str, values: dict[str, Any]) -> None: ...

    def stop_requested(self, job_id: str) -> bool: ...


class RunningJob(Mapping[str, Any]):
    """A mapping of the parameters, plus the channel back.

    Attributes:
        parameters: a dict of this run alone; changing it changes nothing outside.
        id: ``"<search>.<number>"``.
        attempt: 0 for the first run, one more for each retry.
        worker_state: what ``worker_init`` returned in this worker; None without one.
        resources: the units that this run has to itself, by kind, such as ``{"gpu": "0"}``.
    """

    __slots__ = ("_channel", "attempt", "id", "parameters", "resources", "worker_state")

    def __init__(
        self,
        parameters: dict[str, Any],
        id: str,
        attempt: int,
        channel: Channel,
        worker_state: Any = None,
        resources: dict[str, str] | None = None,
    ) -> None:
        self.parameters = parameters
        self.id = id
        self.attempt = attempt
        self.worker_state = worker_state
        self.resources = dict(resources) if resources else {}
        self._channel = channel

    def __getitem__(self, name: str) -> Any:
        return self.parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __repr__(self) -> str:
        return f"RunningJob({self.id!r}, attempt={self.attempt}, {self.parameters!r})"

    def report(self, progress: float, phase: str = "") -> bool:
        """Say how far it is. Calling it often is cheap: what comes too fast is merged.

        Args:
            progress: from 0 to 1; what lies outside is moved to the nearer end.
            phase: what it is doing, in a few words.

        Returns:
            whether it was asked to stop, as :meth:`stopped`.

        Raises:
            ValueError: progress is NaN.
            TypeError: progress is not a number.
        """
        try:
            if math.isnan(progress):
                raise ValueError("report() takes a progress from 0 to 1, not NaN")
            reached = min(1.0, max(0.0, float(progress)))
        except OverflowError:  # an int that is larger than any float
            reached = 1.0 if progress > 0 else 0.0
        # Plain text: a class of the user's would have to be unpickled where this is read.
        self._channel.progress(self.id, reached, phase if type(phase) is str else text_of(phase))
        return self.stopped()

    def record(self, **values: Any) -> None:
        """Keep intermediate values, such as ``record(budget=3, objective=0.8)``; they outlive a crash of the job."""
        self._channel.record(self.id, values)

    def stopped(self) -> bool:
        """Whether it was asked to stop: cancelled, pruned or out of time. Return soon; what you return is kept."""
        return self._channel.stop_requested(self.id)


class call_with_kwargs:  # noqa: N801 - read as a function
    """Wrap a function written as ``train(lr, depth)`` so that it can be a run function. Picklable if ``fn`` is.

    Args:
        fn: called with the parameters of the job as keyword arguments, and with ``run_function_kwargs``.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        if not callable(fn):
            raise TypeError(f"call_with_kwargs takes a callable, not {fn!r}")
        self.fn = fn

    def __call__(self, job: Mapping[str, Any], **kwargs: Any) -> Any:
        return self.fn(**job, **kwargs)

    def __repr__(self) -> str:
        return f"call_with_kwargs({self.fn!r})"


def is_coroutine_function(fn: Any) -> bool:
    """Whether calling ``fn`` gives an awaitable: an ``async def``, or a partial, wrapper or callable object of one."""
    while True:
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, call_with_kwargs):
            fn = fn.fn
        else:
            break
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def are_plain(parameters: Collection[dict[str, Any]], types: frozenset[Any] = SCALARS) -> bool:
    """Whether the parameters of all these jobs are nothing but numbers, strings, booleans and None; or of ``types``."""
    try:
        return _are_all(parameters, types)
    except BaseException:
        # Ctrl-C; or the __hash__ of a metaclass, which does it again.
        if attempt(_are_all, parameters, types)[1] is None:
            raise
        return False


def _are_all(parameters: Collection[dict[str, Any]], types: frozenset[Any]) -> bool:
    return types.issuperset(map(type, chain.from_iterable(map(dict.values, parameters))))


def own_copy(parameters: dict[str, Any]) -> dict[str, Any]:
    """A copy of parameters that shares no container with them: dicts, lists, tuples and sets are copied at every depth.

    Other objects, arrays and instances of subclasses among them, are shared; copying those is not ours to do.
    """
    for value in parameters.values():
        if id(type(value)) not in _SCALARS:
            break
    else:
        return parameters.copy()
    try:
        return _own_values(parameters)
    except BaseException as exc:
        # Nested deeper than Python counts, or a key whose __hash__ raises, again: shared rather than refused.
        if not isinstance(exc, Exception) and attempt(_own_values, parameters)[1] is None:
            raise
        return parameters.copy()


def _own_values(parameters: dict[str, Any]) -> dict[str, Any]:
    memo: dict[int, Any] = {}
    return {key: _own(value, memo) for key, value in parameters.items()}


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a container. The same one twice, or within itself, stays one: ``memo`` has those met so far."""
    kind = type(value)
    if id(kind) not in _CONTAINERS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is set:  # what is in it is hashable, so it does not change
        memo[id(value)] = copy = value.copy()
        return copy
    if _SCALARS.issuperset(map(id, map(type, value.values() if kind is dict else value))):
        memo[id(value)] = flat = value if kind is tuple else value.copy()
        return flat
    if kind is dict:
        mapping: dict[Any, Any] = {}
        memo[id(value)] = mapping
        for key, one in value.items():
            mapping[key] = _own(one, memo)
        return mapping
    if kind is list:
        items: list[Any] = []
        memo[id(value)] = items
        items.extend(_own(one, memo) for one in value)
        return items
    parts = tuple(_own(one, memo) for one in value)
    # A tuple that is in a list of its own was copied on the way.
    return memo.setdefault(id(value), parts)
