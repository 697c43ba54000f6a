"""Stored values of numpy, and pickles: nothing is opened that was not allowed to be."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy
from bounds import bounded
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from evalkit.errors import StorageFormatError
from evalkit.storage import OpaqueValue
from evalkit.storage.codec import decode, encode

dtypes = arrays.scalar_dtypes() | arrays.byte_string_dtypes() | arrays.unicode_string_dtypes()
of_numpy = dtypes.flatmap(
    lambda dtype: (
        arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3))
        | arrays.from_dtype(dtype)
    )
)


@bounded(200)
@given(of_numpy)
def test_whatever_numpy_holds_comes_back(value: Any) -> None:
    array = numpy.asarray(value)
    found = decode(encode({"value": [value]}))["value"][0]
    assert type(found) is type(value)
    assert numpy.asarray(found).shape == array.shape
    if array.dtype.kind not in "US" or isinstance(value, numpy.ndarray):
        assert numpy.asarray(found).dtype == array.dtype
        assert numpy.asarray(found).tobytes() == array.tobytes()
    else:
        assert found == value


class _Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


nests = st.recursive(
    st.just("trap"),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(["a", "__evalkit__"]), inner, min_size=1)
        | st.dictionaries(st.integers(), inner, min_size=1, max_size=2)
    ),
    max_leaves=5,
)


@bounded(100)
@given(nests)
def test_no_pickle_is_opened_unless_it_is_allowed(nest: Any) -> None:
    path = Path("/nonexistent/trap")
    found = decode(encode(_planted(nest, path)))
    traps = _leaves(found)
    assert traps
    assert all(type(trap) is OpaqueValue for trap in traps)
    assert encode(found) == encode(decode(encode(found)))


def _planted(nest: Any, path: Path) -> Any:
    if nest == "trap":
        return _Trap(path)
    if isinstance(nest, dict):
        return {key: _planted(one, path) for key, one in nest.items()}
    return type(nest)(_planted(one, path) for one in nest)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value]


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["__evalkit__", "a"]), inner),
    max_leaves=8,
)
kinds = st.sampled_from(
    ["tuple", "set", "dict", "int", "bytes", "datetime", "numpy", "enum", "pickle", "Fraction", "x"]
)


@bounded(200)
@given(st.builds(lambda kind, payload: {"__evalkit__": [kind, payload]}, kinds, json_like) | json_like)
def test_whatever_stands_in_a_database_is_read_or_refused(forged: Any) -> None:
    with contextlib.suppress(StorageFormatError):
        decode(json.dumps(forged))
