"""Values whose methods raise anything, by kind: for the run functions of tests, also those in other processes."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy


class Strange(BaseException):
    """Nothing that anybody expects."""


ERRORS: list[type[BaseException]] = [
    RuntimeError,
    SystemExit,
    KeyboardInterrupt,
    MemoryError,
    GeneratorExit,
    RecursionError,
    AttributeError,
    Strange,
]
_METHODS = (
    *("__repr__", "__str__", "__format__", "__bool__", "__eq__", "__ne__", "__lt__", "__gt__", "__hash__", "__len__"),
    *("__iter__", "__float__", "__int__", "__index__", "__abs__", "__contains__", "__getitem__", "__sizeof__"),
    *("__reduce_ex__", "__reduce__", "__getstate__", "__dir__", "__deepcopy__", "__copy__", "__call__"),
    *("keys", "items", "values", "get", "startswith", "tolist", "isoformat", "encode", "split", "tobytes"),
)


def hostile(base: type, error: type[BaseException], *, wrong: bool = False, **more: Any) -> type:
    """A class derived from ``base`` whose methods raise ``error``, or return what they should not."""

    def method(*_: Any, **__: Any) -> Any:
        if wrong:
            return Strange
        raise error("hostile")

    members: dict[str, Any] = dict.fromkeys(_METHODS, method)
    return type(f"Hostile{base.__name__}", (base,), {**members, "__module__": __name__, **more})


class Proxy:
    """As an unbound LocalProxy of werkzeug."""

    @property
    def __class__(self) -> Any:
        raise RuntimeError("working outside of context")


class Nothing:
    """Any attribute of it raises."""

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(name)


class _Meta(type):
    def __hash__(cls) -> int:
        raise SystemExit("hash of a class")

    def __eq__(cls, other: object) -> bool:
        raise KeyboardInterrupt("a class compared")

    def __instancecheck__(cls, instance: object) -> bool:
        raise MemoryError("isinstance")

    def __getattribute__(cls, name: str) -> Any:
        raise GeneratorExit(name)


class OfMeta(metaclass=_Meta):
    pass


class _Equal(type):
    def __hash__(cls) -> int:
        return hash(float)

    def __eq__(cls, other: object) -> bool:
        return True


class TakesItselfForFloat(metaclass=_Equal):
    pass


class NoMapping(Mapping[str, Any]):
    """A mapping that raises when it is looked through."""

    def __getitem__(self, name: str) -> Any:
        raise SystemExit(name)

    def __iter__(self) -> Iterator[str]:
        yield "objective"
        raise KeyboardInterrupt("iteration")

    def __len__(self) -> int:
        return 2


class Key:
    """A key that is found where ``objective`` is looked for, and then raises."""

    def __init__(self, name: str = "objective") -> None:
        self._name = name

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        raise SystemExit("a key compared")


class TextOfStrangeType:
    """Its text is a str whose own methods raise."""

    def __str__(self) -> str:
        return _Text("text")

    __repr__ = __str__


_Text = hostile(str, SystemExit)


class Locked:
    """Does not pickle, and does not print."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        raise KeyboardInterrupt("x")


def changing() -> dict[Any, Any]:
    """A dict that another thread changes, for a second."""
    found: dict[Any, Any] = {"objective": 0.5, "metadata": {}}

    def change() -> None:
        for _ in range(300):
            for n in range(100):
                found[n] = [n]
                found["metadata"][str(n)] = (n,)
            for n in range(100):
                del found[n], found["metadata"][str(n)]

    threading.Thread(target=change, daemon=True).start()
    return found


def within_itself() -> list[Any]:
    """A list that holds itself twice, beside what does not pickle."""
    found: list[Any] = [Locked()]
    found += [found, {"me": found}, (found,)]
    return found


def deep() -> Any:
    value: Any = Locked()
    for _ in range(100_000):
        value = (value,)
    return value


def shared() -> Any:
    """Lists that hold each other: 2^60 of them, if each is counted as often as it is met."""
    value: Any = [1.5]
    for _ in range(60):
        value = [value, value]
    return value


def array(value: Any) -> Any:
    made = numpy.empty(2, object)
    made[:] = 1.5, value
    return made


def structured(value: Any) -> Any:
    made = numpy.zeros(2, [("a", float), ("b", object)])
    made["b"][1] = value
    return made


def _kinds() -> dict[str, Callable[[], Any]]:
    kinds: dict[str, Callable[[], Any]] = {
        "proxy": Proxy,
        "nothing": Nothing,
        "class of a metaclass": OfMeta,
        "the class itself": lambda: OfMeta,
        "equal to float": TakesItselfForFloat,
        "no mapping": NoMapping,
        "key": lambda: {Key(): 1, Key("metadata"): 2, "a": 3},
        "text": TextOfStrangeType,
        "locked": Locked,
        "changing": changing,
        "within itself": within_itself,
        "deep": deep,
        "surrogates": lambda: "\ud800 \udfff",
        "huge int": lambda: 10**100_000,
        "0-d array": lambda: numpy.array(Proxy(), object).reshape(()),
        "array": lambda: array(Locked()),
        "structured array": lambda: structured(Locked()),
        "defaultdict": lambda: collections.defaultdict(Locked().__repr__, a=1),
    }
    for error in ERRORS:
        for base, make in {
            object: lambda cls: cls(),
            str: lambda cls: cls("F_x"),
            int: lambda cls: cls(7),
            float: lambda cls: cls(0.5),
            dict: lambda cls: cls(objective=0.5),
            list: lambda cls: cls([0.5]),
            tuple: lambda cls: cls((0.5, 1)),
            bytes: lambda cls: cls(b"x"),
        }.items():
            cls = hostile(base, error)
            kinds[f"{base.__name__}, {error.__name__}"] = lambda make=make, cls=cls: make(cls)
    for base in (object, str, float, tuple):
        cls = hostile(base, RuntimeError, wrong=True)
        kinds[f"{base.__name__}, wrong types"] = cls
    return kinds


KINDS = _kinds()


def returns(job: Any) -> Any:
    """Return, record and give as metadata a value of the kind ``job["kind"]``, each where ``job["place"]`` says so."""
    make = KINDS.get(job["kind"])
    if make is None:
        return 1.0
    place = job["place"]
    if place == "record":
        job.record(good=1, bad=make(), more=[make()])
        return 1.0
    if place == "metadata":
        return {"objective": 1.0, "metadata": {"good": 1, "bad": make()}}
    if place == "is the metadata":
        return {"objective": 1.0, "metadata": make()}
    if place == "part":
        return {"objective": 1.0, "good": (1, [2]), "bad": make(), "list": [make(), 3]}
    if place == "objective":
        return {"objective": make()}
    if place == "objectives":
        return 0.5, make()
    return make()


PLACES = ("output", "part", "metadata", "is the metadata", "record", "objective", "objectives")
