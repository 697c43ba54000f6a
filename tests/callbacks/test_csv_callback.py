from __future__ import annotations

import csv
import datetime
import enum
import io
import math
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.callbacks import CSVCallback
from evalkit.callbacks.table import encode_row, records, split_record, unquote, whole_length
from evalkit.job import Job, JobCause, JobState, WorkerIdentity

Ended = Callable[..., Job]


def read(path: Path, *, alive: bool = False) -> list[dict[str, str]]:
    """The rows of a file that must be whole: a header, and as many cells in every row.

    Where the writer is ``alive``, or was killed in the act, the kernel may show a write as far as the end of a page.
    """
    data = path.read_bytes()
    if alive and len(data) % 4096 == 0:
        data = data[: whole_length(io.BytesIO(data))]
    assert data.endswith(b"\n")
    header, *rows = csv.reader(io.StringIO(data.decode(), newline=""))
    assert len(set(header)) == len(header)
    assert {len(row) for row in rows} <= {len(header)}
    return [dict(zip(header, row, strict=True)) for row in rows]


def write(path: Path, *jobs: Job) -> list[dict[str, str]]:
    callback = CSVCallback(path)
    for job in jobs:
        callback.on_done(job)
    callback.on_close()
    return read(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


# -- what a row says -----------------------------------------------------------------------------------------------


def test_columns_and_their_order(ended: Ended, path: Path) -> None:
    job = ended({"objective": 0.5, "loss": 2, "metadata": {"gpu": 3}}, args={"lr": 0.1, "layers": 4}, id="s.1.7")
    job.measured.ran_by = WorkerIdentity("node1", 7, "serial-0")
    (row,) = write(path, job)
    assert list(row) == [
        "p:lr", "p:layers", "objective", "o:loss", "search_id", "job_id", "job_status",
        "m:timestamp_submit", "m:timestamp_start", "m:timestamp_end", "m:timestamp_gather", "m:host", "m:pid",
        "m:worker", "m:attempt", "m:duration", "m:gpu", "m:cpu_time", "m:peak_rss",
    ]  # fmt: skip
    known = {name: text for name, text in row.items() if text}
    assert known == {
        "p:lr": "0.1", "p:layers": "4", "objective": "0.5", "o:loss": "2", "search_id": "s.1", "job_id": "7",
        "job_status": "DONE", "m:timestamp_submit": "1.0", "m:timestamp_start": "2.0", "m:timestamp_end": "4.5",
        "m:timestamp_gather": "4.5", "m:host": "node1", "m:pid": "7", "m:worker": "serial-0", "m:attempt": "0",
        "m:duration": "2.5", "m:gpu": "3",
    }  # fmt: skip


class Colour(enum.Enum):
    RED = "red"


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "True"),
        (3, "3"),
        (0.1, "0.1"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float64(0.1), "0.1"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        (np.bool_(True), "True"),
        (np.str_("word"), "word"),
        (np.longdouble(0.5), "0.5"),
        (np.array([[1, 2], [3, 4]]), "[[1, 2], [3, 4]]"),
        (Colour.RED, "red"),
        (JobState.DONE, "DONE"),
        ([1, "é", None], '[1, "é", null]'),
        ({"a": np.float32(0.5), "b": {1}}, '{"a": 0.5, "b": [1]}'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        pytest.param(10**5000, hex(10**5000), id="huge"),
        ("a,b", "a,b"),
        ('say "so"', 'say "so"'),
        ("one\ntwo\r\nthree\rfour", "one\ntwo\r\nthree\rfour"),
        ("nul\0nul", "nul\0nul"),
        (" spaces ", " spaces "),
        ("\ud800", "\\ud800"),
        ("=1+1", "=1+1"),
        pytest.param("x" * 100_000, "x" * 100_000, id="long"),
    ],
)
def test_values_are_read_back(ended: Ended, path: Path, value: Any, text: str) -> None:
    first, second = write(path, ended({"objective": 1, "v": value}, args={"v": value, "w": 1}), ended(2))
    assert (first["p:v"], first["p:w"], first["o:v"], second["objective"]) == (text, "1", text, "2")


def test_what_has_no_text_costs_no_row(ended: Ended, path: Path) -> None:
    (row,) = write(path, ended(1.0, args={"v": Mute()}))
    assert "Mute object" in row["p:v"]


def test_names_are_quoted_too(ended: Ended, path: Path) -> None:
    write(path, ended(1.0, args={'a,"b"\nc': 1}))
    rows = write(path, ended(2.0, args={'a,"b"\nc': 2, "d": 3}))
    assert [(row['p:a,"b"\nc'], row["p:d"]) for row in rows] == [("1", ""), ("2", "3")]


@pytest.mark.parametrize(
    ("output", "options", "objective"),
    [
        (1, {}, "1"),
        (np.float64(0.25), {}, "0.25"),
        (math.nan, {}, "nan"),
        (math.inf, {}, "inf"),
        ("F_diverged", {}, "F_diverged"),
        ({"objective": "F_diverged"}, {}, "F_diverged"),
        (None, {}, ""),
        (None, {"state": JobState.FAILED, "cause": JobCause.CRASH}, "F_CRASH"),
        (None, {"state": JobState.FAILED}, "F_FAILED"),
        (None, {"state": JobState.CANCELLED}, "F_CANCELLED"),
        (None, {"state": JobState.PRUNED}, "F_PRUNED"),
        (0.5, {"state": JobState.PRUNED}, "0.5"),
    ],
)
def test_objective_and_status(ended: Ended, path: Path, output: Any, options: Any, objective: str) -> None:
    (row,) = write(path, ended(output, **options))
    assert (row["objective"], row["job_status"]) == (objective, options.get("state", "DONE"))


def test_an_output_without_objective_is_kept(ended: Ended, path: Path) -> None:
    rows = write(path, ended("words"), ended([1, "a"]), ended({"loss": 3}))
    assert [(row["objective"], row["o:output"], row["o:loss"]) for row in rows] == [
        ("", "words", ""),
        ("", '[1, "a"]', ""),
        ("", "", "3"),
    ]


def test_jobs_of_others_have_rows_unless_unwanted(ended: Ended, path: Path, tmp_path: Path) -> None:
    for name, include, count in (("a.csv", True, 1), ("b.csv", False, 0)):
        callback = CSVCallback(tmp_path / name, include_others=include)
        callback.on_done_other(ended(1.0))
        callback.on_close()
        assert (len(read(tmp_path / name)) if count else int((tmp_path / name).exists())) == count


# -- many objectives and late columns ------------------------------------------------------------------------------


def test_failures_before_the_first_of_many_objectives_stand_in_all_of_them(ended: Ended, path: Path) -> None:
    failed = {"state": JobState.FAILED, "cause": JobCause.MEMORY}
    callback = CSVCallback(path)
    callback.on_done(ended(**failed))
    callback.on_done(ended("F_x,y"))
    assert [row["objective"] for row in read(path)] == ["F_MEMORY", "F_x,y"]
    for job in (ended((1, 2.5)), ended(**failed), ended((1, 2, 3)), ended("F_z")):
        callback.on_done(job)
    callback.on_close()
    rows = read(path)
    assert "objective" not in rows[0]
    assert list(rows[0])[1:4] == ["objective_0", "objective_1", "objective_2"]
    assert [[row[f"objective_{index}"] for index in range(3)] for row in rows] == [
        ["F_MEMORY"] * 3,
        ["F_x,y"] * 3,
        ["1", "2.5", ""],
        ["F_MEMORY"] * 3,
        ["1", "2", "3"],
        ["F_z"] * 3,
    ]


def test_results_of_one_and_of_many_objectives_stand_side_by_side(ended: Ended, path: Path) -> None:
    rows = write(path, ended("F_a"), ended(0.5), ended((1, 2)), ended("F_b"), ended(0.75))
    assert [[row[name] for name in ("objective", "objective_0", "objective_1")] for row in rows] == [
        ["F_a", "F_a", "F_a"],
        ["0.5", "", ""],
        ["", "1", "2"],
        ["F_b", "F_b", "F_b"],
        ["0.75", "", ""],
    ]


def test_late_columns_widen_the_file_in_their_group(ended: Ended, path: Path) -> None:
    rows = write(
        path,
        ended(1.0, args={"a": "x\ny"}),
        ended({"objective": 2.0, "loss": 5}, args={"b": 2}),
        ended({"objective": 3.0, "metadata": {"gpu": 0}}, args={"a": 3}),
    )
    names = list(rows[0])
    assert names[:4] == ["p:a", "p:b", "objective", "o:loss"]
    assert names[-1] == "m:gpu"
    assert [(row["p:a"], row["p:b"], row["objective"], row["o:loss"], row["m:gpu"]) for row in rows] == [
        ("x\ny", "", "1.0", "", ""),
        ("", "2", "2.0", "5", ""),
        ("3", "", "3.0", "", "0"),
    ]


def test_a_stable_file_is_only_appended_to(ended: Ended, path: Path) -> None:
    callback = CSVCallback(path)
    callback.on_done(ended(1.0))
    inode, before = path.stat().st_ino, path.read_bytes()
    for job in (ended(2.0), ended("F_x"), ended(state=JobState.CANCELLED)):
        callback.on_done(job)
        assert len(read(path)) == job.number + 1  # it is there as soon as the job has ended
    assert path.stat().st_ino == inode
    assert path.read_bytes().startswith(before)
    callback.on_done(ended(1.0, args={"late": 1}))
    assert path.stat().st_ino != inode
    callback.on_close()


def test_widening_keeps_the_mode_and_the_link(ended: Ended, tmp_path: Path) -> None:
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    link.symlink_to(real)
    write(link, ended(1.0))
    real.chmod(0o640)
    write(link, ended(1.0, args={"late": 1}))
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [link, real]


# -- resuming ------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_continued(ended: Ended, path: Path) -> None:
    write(path, ended(1.0))
    before = path.read_bytes()
    assert [row["objective"] for row in write(path, ended(2.0))] == ["1.0", "2.0"]
    assert path.read_bytes().startswith(before)
    assert [row["objective"] for row in write(path, ended(3.0, args={"late": 1}))] == ["1.0", "2.0", "3.0"]


def test_a_callback_can_be_used_after_its_close(ended: Ended, path: Path) -> None:
    callback = CSVCallback(path)
    callback.on_close()
    assert not path.exists()
    for value in (1.0, 2.0):
        callback.on_done(ended(value))
        callback.on_close()
        callback.on_close()
    assert [row["objective"] for row in read(path)] == ["1.0", "2.0"]


def test_every_torn_last_row_is_cut_off(ended: Ended, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, ended(1.0, args={"a": "one\ntwo"}))
    first = path.read_bytes()
    write(path, ended(2.0, args={"a": 'three\n"four"\n,'}))
    both = path.read_bytes()
    for length in range(len(first) + 1, len(both)):
        path.write_bytes(both[:length])
        caplog.clear()
        assert [row["p:a"] for row in write(path, ended(3.0, args={"a": "five"}))] == ["one\ntwo", "five"]
        assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_tail_of_zeros_is_cut_off(ended: Ended, path: Path) -> None:
    write(path, ended(1.0))
    with path.open("ab") as file:
        file.write(bytes(5000))
    assert [row["objective"] for row in write(path, ended(2.0))] == ["1.0", "2.0"]


def test_what_a_killed_rewrite_left_is_cleared(ended: Ended, path: Path) -> None:
    write(path, ended(1.0))
    (path.parent / ".results.csv.tmp").write_bytes(b"p:x,objec")
    assert len(write(path, ended(2.0))) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_deephyper_wrote_is_continued(ended: Ended, path: Path) -> None:
    path.write_bytes(b"p:x,objective,job_id,job_status,m:timestamp_submit\r\n0.5,F,0,DONE,0.25\r\n")
    rows = write(path, ended((1, 2), args={"x": 1}))
    assert [(row["p:x"], row["objective_1"], row["job_id"], row["m:timestamp_submit"]) for row in rows] == [
        ("0.5", "F", "0", "0.25"),
        ("1", "2", "0", "1.0"),
    ]


def test_a_failure_finds_a_place_in_a_file_without_objective(ended: Ended, path: Path) -> None:
    path.write_bytes(b"p:x,o:loss,job_id,job_status\n1,2,0,DONE\n")
    assert [row["objective"] for row in write(path, ended("F_x"))] == ["", "F_x"]


def test_an_empty_file_is_a_new_one(ended: Ended, path: Path) -> None:
    path.touch()
    assert len(write(path, ended(1.0))) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name,age\nx,3\n", "column 'name'"),
        (b"p:x,objective\n1,2\n", "lacks the column 'job_id'"),
        (b"p:x,p:x,job_id,job_status\n", "a column twice"),
        (b"p:x,job_id,job_status", "no header line"),
        (b"\x89PNG\r\n\x1a\n\xff", "not text"),
        (b"\n", "column ''"),
        (bytes(100), "no header line"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        CSVCallback(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_paths_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; create it first"):
        CSVCallback(tmp_path / "missing" / "results.csv")
    with pytest.raises(ValueError, match="not a regular file"):
        CSVCallback(tmp_path)


# -- what happens to the file from outside --------------------------------------------------------------------------


def test_a_file_that_was_moved_away_is_begun_anew(ended: Ended, path: Path) -> None:
    callback = CSVCallback(path)
    callback.on_done(ended(1.0))
    path.rename(path.with_name("old.csv"))
    callback.on_done(ended(2.0))
    callback.on_close()
    assert [row["objective"] for row in read(path.with_name("old.csv"))] == ["1.0"]
    assert [row["objective"] for row in read(path)] == ["2.0"]


def test_a_second_writer_waits_for_the_first_to_close(ended: Ended, path: Path) -> None:
    first, second = CSVCallback(path), CSVCallback(path)
    first.on_done(ended(1.0))
    with pytest.raises(BlockingIOError, match="another process is writing"):
        second.on_done(ended(2.0))
    first.on_close()
    second.on_close()
    assert [row["objective"] for row in read(path)] == ["1.0", "2.0"]


def run_python(code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True, timeout=300
    )


def test_rows_that_find_no_space_are_written_once_there_is_some(path: Path) -> None:
    done = run_python(
        """
        import errno, resource, signal, sys
        from evalkit.callbacks import CSVCallback
        from evalkit.job import Job, JobState
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def ended(number):
            job = Job(f"s.{number}", {"x": "v" * 100})
            job.start(0.0)
            job.finish(JobState.DONE, output=number)
            return job
        callback = CSVCallback(sys.argv[1])
        errors = 0
        for number in range(60):
            if number == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
            if number == 40:
                assert open(sys.argv[1], "rb").read().endswith(b"\\n")
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            try:
                callback.on_done(ended(number))
            except OSError as error:
                assert error.errno == errno.EFBIG
                errors += 1
        callback.on_close()
        print(errors)
        """,
        path,
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 10
    assert [int(row["job_id"]) for row in read(path)] == list(range(60))


WRITER = """
    import sys
    from evalkit.callbacks import CSVCallback
    from evalkit.job import Job, JobState
    callback = CSVCallback(sys.argv[1])
    number, widen = int(sys.argv[2]), int(sys.argv[3])
    while True:
        args = {"x": number, "text": 'a "quoted"\\nline, ' * (number % 50)}
        if widen and number % widen == 0:
            args[f"late{number}"] = 1
        job = Job(f"search.{number}", args)
        job.start(0.0)
        job.finish(JobState.DONE, output=float(number))
        callback.on_done(job)
        print(number, flush=True)
        number += 1
"""


@pytest.mark.parametrize(("widen", "after"), [(0, 400), (25, 130), (1, 17)])
def test_a_killed_writer_leaves_whole_rows_and_the_next_goes_on(path: Path, widen: int, after: int) -> None:
    start = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(start), str(widen)],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            acknowledged = start - 1
            for _ in range(after):
                acknowledged = int(writer.stdout.readline())
            read(path, alive=True)
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                if line.endswith("\n"):
                    acknowledged = int(line)
        numbers = [int(row["job_id"]) for row in read(path, alive=True)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) in (acknowledged + 1, acknowledged + 2)  # the last one may not have been said
        start = len(numbers)


# -- the bytes -----------------------------------------------------------------------------------------------------

cells = st.text(st.sampled_from('ab,"\n\r\0 é'), max_size=6)


@given(st.lists(st.lists(cells, min_size=2, max_size=4), max_size=5), st.integers(0, 40))
def test_records_are_told_apart(rows: list[list[str]], cut: int) -> None:
    encoded = [encode_row(row) for row in rows]
    whole = b"".join(encoded)
    text = whole.decode()
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows
    assert [[unquote(field) for field in split_record(record)] for record in records(io.BytesIO(whole))] == rows
    lengths = [sum(map(len, encoded[:count])) for count in range(len(encoded) + 1)]
    torn = whole[: max(0, len(whole) - cut)]
    assert whole_length(io.BytesIO(torn)) == max(length for length in lengths if length <= len(torn))


def test_a_torn_row_of_many_megabytes_is_found() -> None:
    first = encode_row(["x" * 3_000_000, 'y"\n' * 700_000])
    torn = io.BytesIO(first + encode_row(['z\n"' * 900_000])[:-2])
    assert whole_length(torn) == len(first)
    assert [len(record) for record in records(io.BytesIO(first))] == [len(first) - 1]
