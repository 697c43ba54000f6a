"""What is written to files comes back from them: CSV of results, files of parameters, spaces on the command line."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounds import bounded
from hypothesis import assume, given
from hypothesis import strategies as st

from evalkit import ErrorInfo, Job, JobCause, JobState
from evalkit.callbacks import CSVCallback
from evalkit.callbacks.table import text_of
from evalkit.cli.params import ParameterFile
from evalkit.cli.scalars import Scalar, parse_scalar
from evalkit.cli.space import Grid, Space
from evalkit.errors import ParametersError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(["007", "+1", "true", '"x"'])
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(text, scalars, max_size=2)
objectives = st.floats() | st.integers() | st.just("F_bad") | st.tuples(st.floats(), st.floats()) | st.none()
ends = st.fixed_dictionaries(
    {
        "args": st.dictionaries(text, values, max_size=3),
        "state": st.sampled_from([JobState.DONE, JobState.FAILED, JobState.CANCELLED]),
        "output": objectives
        | st.builds(
            lambda objective, more: {**more, "objective": objective},
            objectives,
            st.dictionaries(text, values, max_size=2),
        ),
        "reopen": st.booleans(),
    }
)


@bounded(80)
@given(st.lists(ends, min_size=1, max_size=6))
def test_every_job_has_its_row_in_the_csv(given: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.csv"
        callback = CSVCallback(path)
        for number, one in enumerate(given):
            job = Job(f"a.b.{number}", one["args"])
            done = one["state"] is JobState.DONE
            error = ErrorInfo("E", "m") if one["state"] is JobState.FAILED else None
            cause = JobCause.CRASH if error else None
            job.restore(one["state"], one["output"] if done else None, error, cause, 0, [], {})
            callback.on_done(job)
            if one["reopen"]:
                callback.on_close()
                callback = CSVCallback(path)
        callback.on_close()
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        assert [row["job_id"] for row in rows] == [str(number) for number in range(len(given))]
        for row, one in zip(rows, given, strict=True):
            assert None not in row
            assert None not in row.values()
            assert (row["search_id"], row["job_status"]) == ("a.b", one["state"])
            shown = {name[2:]: cell for name, cell in row.items() if name.startswith("p:")}
            assert {name: cell for name, cell in shown.items() if cell} == {
                name: text_of(value) for name, value in one["args"].items() if text_of(value)
            }
            cells = [cell for name, cell in row.items() if name.startswith("objective")]
            output = one["output"]
            objective = output["objective"] if isinstance(output, dict) else output
            if one["state"] is not JobState.DONE:
                assert set(cells) == {"F_CRASH" if one["state"] is JobState.FAILED else "F_CANCELLED"}
            elif isinstance(objective, tuple):
                assert [row["objective_0"], row["objective_1"]] == [text_of(part) for part in objective]
            elif isinstance(objective, str):
                assert set(cells) == {objective}
            elif objective is not None:
                assert row["objective"] == text_of(objective)


def _written(value: Scalar) -> str:
    """A value as it is to be written for :func:`parse_scalar`."""
    return json.dumps(value) if isinstance(value, str) else "" if value is None else text_of(value)


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, float):
        return type(found) is float and (found == value or (math.isnan(found) and math.isnan(value)))
    return type(found) is type(value) and bool(found == value)


def _tried(read: Callable[[], list[Any]]) -> tuple[list[Any] | None, str]:
    """What is read, or why it is refused."""
    try:
        return read(), ""
    except ParametersError as exc:
        return None, str(exc)


names = text.filter(lambda name: bool(name.strip()) and "\0" not in name)


@bounded(150)
@given(scalars)
def test_a_scalar_reads_as_it_was_written(value: Scalar) -> None:
    assert _same(parse_scalar(_written(value)), value)


@bounded(80)
@given(st.lists(names, min_size=1, max_size=3, unique_by=str.strip), st.data())
def test_a_file_of_parameters_reads_as_it_was_written(columns: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(*[scalars for _ in columns]), min_size=1, max_size=4))
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_written(value) for value in row])
    with tempfile.TemporaryDirectory() as folder:
        table, lines = Path(folder) / "params.csv", Path(folder) / "params.jsonl"
        table.write_bytes(buffer.getvalue().encode())
        lines.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
        from_table = list(ParameterFile(str(table)))
        from_lines = list(ParameterFile(str(lines)))
        assert ParameterFile(str(table)).check() == ParameterFile(str(lines)).check() == len(rows)
    for found, strip in ((from_table, str.strip), (from_lines, str)):
        assert len(found) == len(rows)
        for configuration, row in zip(found, rows, strict=True):
            assert configuration is not None
            assert list(configuration) == [strip(name) for name in columns]
            assert all(map(_same, configuration.values(), row))


@bounded(80)
@given(st.binary(max_size=60), st.sampled_from(["params.csv", "params.jsonl"]))
def test_whatever_stands_in_a_file_of_parameters_is_read_or_refused(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        found, refused = _tried(lambda: list(ParameterFile(str(path))))
        assert name in refused if found is None else all(isinstance(one, dict) for one in found)


numbers = st.integers(-1000, 1000) | st.floats(-1e300, 1e300) | st.integers(-(10**300), 10**300)


@bounded(150)
@given(numbers, numbers, st.booleans(), st.booleans(), st.integers(0, 100))
def test_draws_of_a_space_lie_in_it_and_are_the_same_each_time(
    a: float, b: float, log: bool, whole: bool, seed: int
) -> None:
    low, high = min(a, b), max(a, b)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    assume(low > 0 or not log)
    spec = f"x={text_of(low)}:{text_of(high)}" + ":int" * whole + ":log" * log
    drawn = [one["x"] for one in Space([spec]).sample(20, seed)]
    start, end = (low, high) if whole else (float(low), float(high))
    assert all(start <= x <= end for x in drawn)
    assert all(type(x) is (int if whole else float) for x in drawn)
    assert [one["x"] for one in Space([spec]).sample(7, seed)] == drawn[:7]


@bounded(150)
@given(st.text('x=:,.0123456789eE+-"\\ logintfa\0é', max_size=15))
def test_whatever_is_written_as_a_space_is_drawn_from_or_refused(spec: str) -> None:
    for make in (lambda: list(Space([spec]).sample(3, 0)), lambda: list(Grid([spec]))):
        found, refused = _tried(make)
        assert found or repr(spec) in refused


@bounded(60)
@given(st.lists(st.lists(scalars, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_grid_is_the_product_of_its_values(axes: list[list[Scalar]]) -> None:
    spelled = [",".join(_written(value) if value is not None else "none" for value in axis) for axis in axes]
    found = list(Grid([f"n{place}={axis}" for place, axis in enumerate(spelled)]))
    assert len(found) == math.prod(map(len, axes))
    assert len(Grid([f"n{place}={axis}" for place, axis in enumerate(spelled)])) == len(found)
    rng = random.Random(0)
    for index in rng.sample(range(len(found)), min(5, len(found))):
        rest = index
        for place in reversed(range(len(axes))):
            rest, at = divmod(rest, len(axes[place]))
            assert _same(found[index][f"n{place}"], axes[place][at])


def test_the_int_of_most_digits_is_read() -> None:
    assert parse_scalar("9" * 4000) == 10**4000 - 1
    assert sys.get_int_max_str_digits() >= 4000


@pytest.mark.parametrize("spec", [f"x=0:1{'0' * 400}", f"x=0:1{'0' * 400}:int", "x=-1.7e308:1.7e308"])
def test_a_range_beyond_the_floats_is_refused(spec: str) -> None:
    with pytest.raises(ParametersError):
        list(Space([spec]).sample(3, 0))
