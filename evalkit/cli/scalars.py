"""Values written as text: in cells of a CSV file, in ``--grid``, ``--space`` and ``--option``.

=====================  ==================================================================================
written                read as
=====================  ==================================================================================
``12``, ``-3``         int; ``007`` and ``+1`` are not how a number is written, so they stay strings
``0.5``, ``1e-3``      float; ``nan``, ``inf`` and ``-inf`` too
``true``, ``false``    bool, in any case
``none``, ``null``     None, in any case; and an empty cell
``"007"``, ``"true"``  str: what stands in double quotes is the string between them (JSON's escapes work); in a
                       CSV file, which has quotes of its own, the cell is written with three quotes on either side
anything else          str, as it is
=====================  ==================================================================================
"""

from __future__ import annotations

import json
import math
import re

__all__ = ["Scalar", "parse_scalar", "split_values"]

Scalar = int | float | bool | str | None

_INT = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {
    "": None,
    "none": None,
    "null": None,
    "true": True,
    "false": False,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
}
_LONGEST_INT = 4000  # digits; Python refuses to read much longer ones
_LONGEST_WORD = max(map(len, _WORDS))


def parse_scalar(text: str) -> Scalar:
    """Read a value, as the table of this module says; never fails, since anything may be a string."""
    word = text.strip()
    if len(word) <= _LONGEST_WORD and word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _INT.fullmatch(word) and len(word) <= _LONGEST_INT:
        return int(word)
    if _FLOAT.fullmatch(word):
        number = float(word)
        # 1e999 is no number that a float can be: better a string than another value.
        if math.isfinite(number) and len(word) <= _LONGEST_INT:
            return number
    if len(word) >= 2 and word[0] == word[-1] == '"':
        try:
            value = json.loads(word)
        except ValueError:
            return text
        return value if isinstance(value, str) else text
    return text


def split_values(text: str) -> list[str]:
    """Split at the commas that stand outside double quotes.

    Raises:
        ValueError: a quote is not closed, or a value is empty.
    """
    values: list[str] = []
    start, quoted, escaped = 0, False, False
    for place, char in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            values.append(text[start:place])
            start = place + 1
    if quoted:
        raise ValueError("a double quote is not closed")
    values.append(text[start:])
    if any(not value.strip() for value in values):
        raise ValueError('a value is empty; write none for None, "" for an empty string')
    return values
