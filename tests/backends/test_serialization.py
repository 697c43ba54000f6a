"""Exceptions of calls, on their way from a worker."""

from __future__ import annotations

import pickle
import sys

import pytest

from evalkit.backends import pack_exception, unpack_exception


class Exits(Exception):
    def __reduce__(self):
        return sys.exit, ("no",)


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def test_an_exception_comes_back_as_it_was():
    exc = unpack_exception(pack_exception(ValueError("no", 3)))
    assert (type(exc), exc.args) == (ValueError, ("no", 3))


@pytest.mark.parametrize(
    ("exc", "said"), [(Exits(), "SystemExit: no"), (NeedsTwo(1, 2), "TypeError: .* missing 1 required .* 'two'")]
)
def test_an_exception_that_cannot_be_rebuilt_is_one_that_says_so(exc, said):
    with pytest.raises(RuntimeError, match=f"what became of a call cannot be read: {said}"):
        raise unpack_exception(pickle.dumps(exc))
