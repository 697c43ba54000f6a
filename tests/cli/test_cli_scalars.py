from __future__ import annotations

import math

import pytest

from evalkit.cli.scalars import parse_scalar, split_values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        (" 4 ", 4),
        ("0", 0),
        ("007", "007"),
        ("+1", "+1"),
        ("1_000", "1_000"),
        ("0.5", 0.5),
        (".5", 0.5),
        ("1e-3", 0.001),
        ("00.5", "00.5"),
        ("1e999", "1e999"),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("none", None),
        ("null", None),
        ("", None),
        ('"007"', "007"),
        ('"true"', "true"),
        ('""', ""),
        ('"', '"'),
        ('"a" and "b"', '"a" and "b"'),
        (" kept ", " kept "),
        ("٣", "٣"),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_values_are_read_as_they_are_written(text: str, value: object) -> None:
    read = parse_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_float() -> None:
    read = parse_scalar("NaN")
    assert isinstance(read, float)
    assert math.isnan(read)


def test_commas_in_quotes_do_not_split() -> None:
    assert split_values('1,"a,b",c') == ["1", '"a,b"', "c"]
    assert split_values(r'"a\",b",c') == [r'"a\",b"', "c"]


@pytest.mark.parametrize("text", ["", "1,,2", "1,", '"a,b'])
def test_what_cannot_be_split_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"empty|closed"):
        split_values(text)
