from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evalkit.cli.params import ParameterFile
from evalkit.errors import ParametersError


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def read(path: str) -> list[dict[str, Any] | None]:
    return list(ParameterFile(path))


def test_csv_cells_are_values(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", b'x, name,empty\r\n1,007,\r\n\r\n0.5,"a,\nb",none\r\n2,"""3""",true')
    assert read(path) == [
        {"x": 1, "name": "007", "empty": None},
        {"x": 0.5, "name": "a,\nb", "empty": None},
        {"x": 2, "name": "3", "empty": True},
    ]
    assert ParameterFile(path).check() == 3


def test_byte_order_marks_are_no_part_of_a_name(tmp_path: Path) -> None:
    assert read(write(tmp_path, "p.csv", b"\xef\xbb\xbfx\n1\n")) == [{"x": 1}]
    assert read(write(tmp_path, "p.jsonl", b'\xef\xbb\xbf{"x": 1}\n')) == [{"x": 1}]


def test_cells_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", b"x,y\n" + b"a" * 200_000 + b",1\n")
    assert read(path) == [{"x": "a" * 200_000, "y": 1}]


def test_json_lines_keep_types(tmp_path: Path) -> None:
    assert read(write(tmp_path, "p.jsonl", b'{"x": "1", "l": [1, 2.0]}\n\n{"x": null}')) == [
        {"x": "1", "l": [1, 2.0]},
        {"x": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"a,b\n1,2\n3\n", "line 3: the row has 1 cells, and the header names 2"),
        ("p.csv", b'a,b\n"x\ny",2\n3,4,5\n', "line 4: the row has 3 cells"),
        ("p.csv", b"", "the file is empty"),
        ("p.csv", b"a,b\n", "there is no row"),
        ("p.csv", b"a,a\n1,2\n", "line 1: the column 'a' is there twice"),
        ("p.csv", b"a,\n1,2\n", "line 1: column 2 has no name"),
        ("p.csv", b"a,b\n1,\x002\n", "line 2: there is a NUL byte"),
        ("p.csv", b"a\n1\n\xff\n", "line 3: this is not UTF-8: byte 0xff at 1"),
        ("p.csv", b'a,b\n1,"2\n', "line 2: this is not CSV"),
        ("p.jsonl", b"", "the file is empty"),
        ("p.jsonl", b'{"x": 1}\n[1]\n', "line 2: each line is a JSON object"),
        ("p.jsonl", b'{"x": 1}\n{"x": \n', "line 2: this is not JSON"),
        ("p.jsonl", b'{"x": 1, "x": 2}\n', "line 1: this is not JSON: the name 'x' is there twice"),
        ("p.jsonl", b'{"x": ' + b"[" * 100_000 + b"\n", "line 1: this is"),
        ("p.jsonl", b'{"x": ' + b"1" * 10_000 + b"}\n", "line 1: this is not JSON"),
        ("p.txt", b"x\n1\n", ".csv or .jsonl"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ParametersError) as caught:
        ParameterFile(path).check()
    assert str(caught.value).startswith(path)
    assert message in str(caught.value)


def test_a_missing_file_has_a_close_match(tmp_path: Path) -> None:
    write(tmp_path, "params.csv", b"x\n1\n")
    with pytest.raises(ParametersError, match=r"did you mean .*params\.csv"):
        ParameterFile(str(tmp_path / "parms.csv"))
    with pytest.raises(ParametersError, match="folder"):
        ParameterFile(str(tmp_path))


def test_reading_is_lazy(tmp_path: Path) -> None:
    """What stands behind is not read before it is asked for: the error at the end does not matter at the start."""
    path = write(tmp_path, "p.jsonl", b'{"x": 1}\n' * 1000 + b"broken\n")
    assert next(iter(ParameterFile(path))) == {"x": 1}
