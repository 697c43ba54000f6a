from __future__ import annotations

import collections
import datetime
import enum
import json
import math
import pickle
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import UUID

import numpy
import pytest
from hostile_values import KINDS, hostile, within_itself
from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.errors import StorageFormatError
from evalkit.storage import OpaqueValue
from evalkit.storage.codec import UnstorableValue, decode, encode


class Colour(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int


class Thing:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = None


class Half(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise RuntimeError("never")


class Hashed:
    error: type[BaseException] | None = None

    def __hash__(self) -> int:
        if self.error is not None:
            raise self.error
        return 1


class Large:
    def __init__(self, value: Any) -> None:
        self.value = value


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __reduce__(self) -> Any:
        raise RuntimeError("never")


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types at every level, with NaN equal to itself and 0.0 apart from -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


text = st.text(st.characters(exclude_categories=())) | st.just("__evalkit__")
hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text | st.binary() | st.dates(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    hashable
    | st.floats()
    | st.complex_numbers(allow_nan=False)
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
    | st.timedeltas()
    | st.times()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.uuids(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(hashable, inner) | st.dictionaries(text, inner)
    ),
    max_leaves=20,
)


@settings(deadline=None, database=None)
@given(values)
def test_round_trip(value: Any) -> None:
    written = encode(value)
    assert written.isascii()
    assert "\0" not in written
    found = decode(written)
    assert same(found, value)
    assert encode(found) == written or isinstance(value, set | frozenset) or "frozenset" in written


@pytest.mark.parametrize(
    "value",
    [
        *(10**5000, -(10**5000), [10**4299], "\ud83d\ude00", "😀", {"\ud83d": 1}, True, [True, 1, 1.0]),
        *({"__evalkit__": None}, {"__evalkit__": ["pickle", ["x", "AA=="]]}, {1: {"__evalkit__": (1,)}}),
        *(collections.OrderedDict([((1,), [2])]), Path("/a"), PurePosixPath("a"), PureWindowsPath("c:\\a")),
        *(datetime.datetime(2024, 1, 1, fold=1), datetime.time(fold=1)),
        *(Decimal("1.10"), Fraction(10**5000, 3), UUID(int=1), Colour.RED, {Colour.RED: Colour.RED}),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3, seconds=1))),
        *(numpy.float64("nan").item(), numpy.float32(0.1), numpy.int8(-1), numpy.bool_(True), numpy.complex64(1j)),
        *(
            numpy.longdouble(1) / 3,
            numpy.str_("ü"),
            numpy.str_(""),
            numpy.bytes_(b"\0a"),
            numpy.datetime64("2024-01-01", "us"),
        ),
        *(numpy.arange(6.0).reshape(2, 3).T, numpy.zeros((2, 0), ">i2"), numpy.array(5), numpy.array(["a", "bc"])),
        *(numpy.array([b"", b"x"]), numpy.array(["2024"], "M8[s]"), {"deep": [numpy.ones(2), (numpy.float16(1),)]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_kept_without_a_pickle(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_an_array_that_was_stored_can_be_written_to() -> None:
    found = decode(encode(numpy.zeros(3)))
    found += 1
    assert found.tolist() == [1.0, 1.0, 1.0]


def test_plain_values_are_plain_json() -> None:
    value = {"x": 1.5, "layers": [1, 2, {"act": "relu"}], "none": None, "smile": "😀"}
    assert json.loads(encode(value)) == value


@pytest.mark.parametrize(
    "value",
    [Thing(), Point(1), collections.defaultdict(int, a=1), numpy.array([1, None])],
)
def test_the_rest_is_a_pickle_that_is_opened_on_demand(value: Any) -> None:
    written = encode({"value": value, "x": 1})
    closed = decode(written)
    assert closed["x"] == 1
    opaque = closed["value"]
    assert type(opaque) is OpaqueValue
    assert opaque.type_name == f"{type(value).__module__}.{type(value).__qualname__}"
    assert opaque.type_name in repr(opaque)
    assert encode(closed) == written
    for found in (opaque.open(), decode(written, allow_pickle=True)["value"]):
        assert type(found) is type(value)
        assert numpy.all(found == value)
    assert pickle.loads(pickle.dumps(opaque)) == opaque


def test_a_function_travels_by_value() -> None:
    def local(x: int) -> int:
        return x + 1

    assert decode(encode(local), allow_pickle=True)(1) == 2


def test_what_does_not_open_here_stays_closed() -> None:
    opaque = OpaqueValue("gone.Thing", b"cgone_module\nThing\n.")
    assert decode(encode(opaque), allow_pickle=True) == opaque
    with pytest.raises(ModuleNotFoundError):
        opaque.open()


def test_reading_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    written = encode([Evil()])
    assert type(decode(written)[0]) is OpaqueValue
    assert not (tmp_path / "touched").exists()
    decode(written, allow_pickle=True)
    assert (tmp_path / "touched").exists()


def test_an_enum_of_a_module_that_is_not_loaded_is_not_imported() -> None:
    written = encode(Colour.RED).replace(json.dumps(__name__), '"no_such_module"')
    assert type(decode(written)) is OpaqueValue


@pytest.mark.parametrize("value", [threading.Lock(), Unprintable()])
def test_what_does_not_pickle_leaves_a_marker(value: Any) -> None:
    found = decode(encode({"a": value, "b": (1,)}), allow_pickle=True)
    assert found["b"] == (1,)
    marker = found["a"]
    assert type(marker) is UnstorableValue
    assert type(value).__qualname__ in marker.type_name
    assert marker.text
    assert decode(encode(marker)) == marker


def test_deep_and_recursive_structures() -> None:
    recursive: list[Any] = []
    recursive.append({"me": recursive})
    found = decode(encode(recursive), allow_pickle=True)
    assert type(found[0]["me"]) is list
    deep: Any = "bottom"
    for _ in range(150):
        deep = {"down": [deep]}
    assert decode(encode(deep), allow_pickle=True) == deep
    for _ in range(100_000):
        deep = (deep,)
    assert decode(encode({"deep": deep, "x": 1}))["x"] == 1


@settings(deadline=None, database=None, max_examples=50)
@given(st.recursive(st.sampled_from(sorted(KINDS)), lambda inner: st.lists(inner) | st.dictionaries(text, inner)))
def test_what_raises_costs_no_more_than_itself(kinds: Any) -> None:
    def made(kinds: Any) -> Any:
        if isinstance(kinds, str):
            return KINDS[kinds]()
        return {key: made(one) for key, one in kinds.items()} if isinstance(kinds, dict) else tuple(map(made, kinds))

    found = decode(encode([(1, {"good": 1.5}), made(kinds), "after"]))
    assert found[0] == (1, {"good": 1.5})
    assert found[2] == "after"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (Half(a=1, lock=threading.Lock()), {"a": 1}),
        (collections.OrderedDict(a=1, lock=threading.Lock()), {"a": 1}),
        (numpy.array([1.5, threading.Lock()], object), [1.5]),
        (hostile(str, SystemExit)("text"), "text"),
        (hostile(int, MemoryError)(7), 7),
        (hostile(float, KeyboardInterrupt)(-0.0), -0.0),
        (hostile(tuple, GeneratorExit)((1, "a")), (1, "a")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_good_parts_are_kept(value: Any, kept: Any) -> None:
    found = decode(encode(value))
    if isinstance(found, dict):
        assert type(found.pop("lock")) is UnstorableValue
    elif isinstance(found, list):
        assert type(found.pop()) is UnstorableValue
    assert same(dict(found) if isinstance(found, dict) else found, kept)


@pytest.mark.parametrize("kind", ["bytes", "array", "object", "list of objects", "deep"])
def test_what_is_too_large_is_not_copied(kind: str) -> None:
    size = 3 * 10**9  # nobody has looked at these pages, so they take no memory, unless they are copied
    value = {
        "bytes": lambda: bytes(size),
        "array": lambda: numpy.zeros(size // 8),
        "object": lambda: Large(numpy.zeros(size // 8)),
        "list of objects": lambda: [Large(bytes(size))],
        "deep": lambda: {"deep": ({"array": numpy.zeros((10, size // 80))},)},
    }[kind]()
    written = encode({"before": (1,), "large": value, "after": numpy.arange(3)})
    assert len(written) < 10_000
    assert "too large: a stored value has at most 200,000,000 characters" in written
    found = decode(written)
    assert found["before"] == (1,)
    assert found["after"].tolist() == [0, 1, 2]


def test_lists_that_hold_each_other() -> None:
    assert decode(encode([within_itself(), 1]))[1] == 1
    twice: list[Any] = []
    twice += [twice, twice, (twice,)]
    assert len(encode(twice)) < 10_000


def test_markers_of_before_are_read() -> None:
    assert decode('{"__evalkit__":["unstorable",["a.B","text"]]}') == UnstorableValue("a.B", "text", "")
    assert encode(UnstorableValue("a.B", "text")) == '{"__evalkit__":["unstorable",["a.B","text"]]}'


def test_a_pickle_that_does_not_fit_where_it_was_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    written = encode({Hashed(): 1})
    monkeypatch.setattr(Hashed, "error", SystemExit)
    ((key, value),) = decode(written, allow_pickle=True).items()
    assert type(key) is OpaqueValue
    assert value == 1


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "{", "nonsense", '{"__evalkit__":1}', '{"__evalkit__":["int","x"]}', '{"__evalkit__":["enum",[1]]}'),
        *('{"__evalkit__":["datetime",[]]}', '{"__evalkit__":["pickle",[]]}'),
        *('{"__evalkit__":["bytes",7]}', '{"__evalkit__":["numpy",["<f8",[3],"AA=="]]}'),
    ],
)
def test_what_was_not_written_by_encode(wrong: str) -> None:
    with pytest.raises(StorageFormatError):
        decode(wrong)


def test_a_kind_of_a_newer_evalkit() -> None:
    with pytest.raises(StorageFormatError, match=r"quaternion.*upgrade"):
        decode('{"__evalkit__":["quaternion",[]]}')


def test_numpy_is_not_imported() -> None:
    script = (
        "import sys; from evalkit.storage.codec import encode, decode; "
        "decode(encode({'x': (1, b'', object())})); assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
