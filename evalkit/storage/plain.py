"""Plain values: those that JSON holds exactly, and that ``json`` writes in C."""

from __future__ import annotations

import json
import json.encoder
import sys
from collections.abc import Callable
from typing import Any

from evalkit.usercode import attempt, type_name

__all__ = ["MAX_DEPTH", "MAX_TEXT", "TAG", "dumps", "plain_text"]

TAG = "__evalkit__"
#: Characters of the text of a value. SQLite takes 1 GB a row, PostgreSQL 1 GB a message, and one may hold parameters,
#: output, records and metadata of a job.
MAX_TEXT = 200_000_000
#: Containers nested deeper are pickled: JSON is read and written recursively.
MAX_DEPTH = 100

_SCALARS = frozenset({str, int, float, bool, type(None)})
_NUMBERS = _SCALARS - {str}
_KEYS = frozenset({str})
_CONTAINERS = frozenset({dict, list})
_NOT_PLAIN = sys.maxsize
_AROUND = 200  # characters for a container, more than it takes: those that hold each other are not looked at for ever


def _encoder() -> Callable[[Any], str]:
    """What writes JSON: the encoder in C, made once, since ``json.dumps`` makes one for each call."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # another Python
        return json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
    escaped = json.encoder.encode_basestring_ascii
    encode = make(None, _refuse, escaped, None, ":", ",", False, False, True)
    return lambda value: escaped(value) if type(value) is str else "".join(encode(value, 0))


def _refuse(value: Any) -> Any:
    raise TypeError(f"{type_name(type(value))} is not plain")


dumps = _encoder()


def plain_text(value: Any, depth: int, longest: int) -> str | None:
    """Return the text of a value that JSON holds exactly; None for any other, or if it takes more characters."""
    try:
        if _weight(value, depth, longest) > longest:
            return None
        text = dumps(value)
    except Exception:  # noqa: BLE001 - an int of too many digits, too little stack, a dict that another thread changes
        return None
    except BaseException:
        # Ctrl-C; or the __hash__ of a metaclass, which does it again.
        if attempt(_weight, value, depth, longest)[1] is None:
            raise
        return None
    # A surrogate: half of a pair, which is fine, or alone, which JSON would join to the next.
    return None if len(text) > longest or "\\ud" in text else text


def _weight(value: Any, depth: int, most: int) -> int:
    """About the most characters that it takes as JSON; ``_NOT_PLAIN`` if JSON does not hold it exactly.

    Beyond ``most`` it may count no further.

    The types of a whole container are looked at in C.
    """
    kind = type(value)
    if kind is dict:
        if not _KEYS.issuperset(map(type, value)) or TAG in value:
            return _NOT_PLAIN
        weight = _AROUND + 26 * len(value) + 12 * sum(map(len, value))
        value = value.values()
    elif kind is list:
        weight = _AROUND + 26 * len(value)
    elif kind is str:
        return 12 * len(value)
    else:
        return 0 if kind in _SCALARS else _NOT_PLAIN
    kinds = set(map(type, value))
    if kinds <= _NUMBERS:
        return weight
    nested = kinds - _SCALARS
    if nested and (depth == 0 or not nested <= _CONTAINERS):
        return _NOT_PLAIN
    if str in kinds:
        weight += 12 * sum([len(one) for one in value if type(one) is str])
    for one in value if nested else ():
        if type(one) in _CONTAINERS:
            weight += _weight(one, depth - 1, most)
            if weight > most:
                break
    return weight
