"""The run functions of the conformance suite of backends, at module level so that workers can import them.

A function that waits is written as a generator that yields whenever it would: :class:`Plain` runs it with sleeps, as a
plain function, and :class:`Coroutine` on an event loop, so that one text of it serves both kinds of run functions.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from evalkit.running import RunningJob

__all__ = [
    "EXCEPTIONS",
    "Coroutine",
    "Locked",
    "NeedsArguments",
    "Plain",
    "Point",
    "UnreadableError",
    "WontLoad",
    "add",
    "add_offset",
    "add_one",
    "admit",
    "ask",
    "await_others",
    "big",
    "chatter",
    "counting_init",
    "die",
    "die_at_first",
    "die_beside",
    "echo",
    "end_in_some_way",
    "end_somehow",
    "exploding_init",
    "fail_at_first",
    "fail_with_records",
    "follow",
    "heed",
    "hold",
    "late_at_first",
    "linger",
    "lock_in_output",
    "make_point",
    "mark",
    "meddle",
    "nap",
    "occupy",
    "report_nan",
    "report_too_far",
    "return_kind",
    "reveal",
    "slow_square",
    "start_children",
    "tell",
    "throw",
    "throw_odd",
    "unloadable",
    "worker_state",
]

#: How long a run function waits for what the test is to do, in seconds; then something is broken.
PATIENCE = 300.0
_POLL = 0.005

Steps = Generator[None, None, Any]


class Plain:
    """A run function that waits, as a plain function."""

    def __init__(self, steps: Callable[..., Steps]) -> None:
        self.steps = steps

    def __call__(self, job: RunningJob, **kwargs: Any) -> Any:
        run = self.steps(job, **kwargs)
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value
            time.sleep(_POLL)


class Coroutine:
    """Any run function, as a coroutine function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    async def __call__(self, job: RunningJob, **kwargs: Any) -> Any:
        result = self.function(job, **kwargs)
        if not inspect.isgenerator(result):
            return result
        while True:
            try:
                next(result)
            except StopIteration as end:
                return end.value
            await asyncio.sleep(_POLL)


def _until(path: str) -> Generator[None, None, None]:
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            Path(f"{path}.missed").touch()
            raise TimeoutError(f"nobody created {path} in {PATIENCE} s")
        yield


def _touch(path: str, text: str = "") -> None:
    """Create a file that is whole from its first moment."""
    scratch = Path(f"{path}.{os.getpid()}.{threading.get_ident()}.new")
    scratch.write_text(text)
    scratch.rename(path)


# -- what returns at once ---------------------------------------------------------------------------------------------


def echo(job: RunningJob) -> dict[str, Any]:
    """Return the parameters."""
    return dict(job)


def add(x: float, y: float = 10.0) -> float:
    """Not a run function by itself: for ``call_with_kwargs``."""
    return x + y


def add_offset(job: RunningJob, offset: float, scale: float = 1.0) -> float:
    """Takes ``run_function_kwargs``."""
    return float(job["x"] * scale + offset)


def reveal(job: RunningJob) -> dict[str, Any]:
    """Return what the job knows of itself and of where it is."""
    return {"id": job.id, "attempt": job.attempt, "pid": os.getpid(), "length": len(job), "keys": sorted(job)}


def meddle(job: RunningJob) -> str:
    """Change everything in reach."""
    job.parameters["x"] = "changed"
    job.parameters["added"] = True
    job.parameters["nested"]["list"].append("changed")
    job.parameters.pop("gone", None)
    return str(sorted(job.parameters))


def return_kind(job: RunningJob) -> Any:
    """Return one of the outputs that mean something."""
    return {
        "none": None,
        "nan": math.nan,
        "inf": -math.inf,
        "failed": "F_diverged",
        "word": "a word",
        "pair": (1.0, 2),
        "mapping": {"objective": 3.5, "metadata": {"epochs": 7}},
        "huge": 10**400,
        "bytes": b"\0\xff",
        "nested": {"a": [{"b": (1, {2})}]},
    }[job["kind"]]


class Point:
    """An object of a class that workers can import."""

    def __init__(self, x: float) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    def __hash__(self) -> int:
        return hash(self.x)


def make_point(job: RunningJob) -> Point:
    """Take an object and return another."""
    return Point(job["point"].x + 1)


def big(job: RunningJob) -> Any:
    """Take something large, check that it arrived whole, and return something as large."""
    data = job["data"]
    if bytes(data[:4]) != b"head" or bytes(data[-4:]) != b"tail":
        raise ValueError("the argument did not arrive whole")
    return {"type": type(data).__name__, "data": data, "length": len(data)}


def mark(job: RunningJob) -> Any:
    """Change an object that is a parameter, and return it."""
    job["point"].x = -1
    return job["point"]


def add_one(job: RunningJob) -> Any:
    """Change an array in place: what arrives belongs to the job."""
    array = job["array"]
    array += 1
    return array


def end_somehow(job: RunningJob) -> str:
    """Report and record, then raise or return."""
    job.report(0.25, "first")
    job.record(step=0)
    job.report(0.75, "second")
    if job["how"] == "raise":
        raise ValueError("as it was told")
    return "returned"


def ask(job: RunningJob) -> bool:
    """Return whether it was asked to stop."""
    return job.stopped()


def report_nan(job: RunningJob) -> None:
    job.report(math.nan)


def report_too_far(job: RunningJob) -> bool:
    return job.report(-3) or job.report(7.5, "far")


def worker_state(job: RunningJob) -> Any:
    """Return what ``worker_init`` returned."""
    return job.worker_state


def counting_init() -> dict[str, int]:
    return {"pid": os.getpid(), "thread": threading.get_ident()}


def exploding_init() -> NoReturn:
    raise RuntimeError("this worker cannot be had")


# -- what fails -------------------------------------------------------------------------------------------------------


class NeedsArguments(Exception):  # noqa: N818 - what it is for
    """An exception that cannot be rebuilt from ``args``, as many libraries have them."""

    def __init__(self, code: int, *, where: str) -> None:
        super().__init__(f"code {code} in {where}")
        self.code = code
        self.where = where


class Locked(Exception):  # noqa: N818 - what it is for
    """An exception that does not pickle."""

    def __init__(self) -> None:
        super().__init__("it holds a lock")
        self.lock = threading.Lock()


class UnreadableError(Exception):
    """An exception that cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class WontLoad:
    """An object that pickles and does not unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> NoReturn:
    raise RuntimeError("it does not load here")


#: kind -> the name of the class that ``throw`` raises for it.
EXCEPTIONS: Mapping[str, str] = {
    "value": "ValueError",
    "chain": "KeyError",
    "arguments": "NeedsArguments",
    "locked": "Locked",
    "unreadable": "UnreadableError",
    "exit": "SystemExit",
    "exit-zero": "SystemExit",
    "interrupt": "KeyboardInterrupt",
    "cancelled": "CancelledError",
    "generator": "GeneratorExit",
    "group": "ExceptionGroup",
    "recursion": "RecursionError",
    "memory": "MemoryError",
}


def throw(job: RunningJob) -> NoReturn:
    """Raise."""
    kind = job["kind"]
    if kind == "chain":
        try:
            raise OSError("the cause below")
        except OSError as exc:
            raise KeyError("the one above") from exc
    if kind == "recursion":
        _endless(0)
    makers: dict[str, Callable[[], BaseException]] = {
        "value": lambda: ValueError("a plain one"),
        "arguments": lambda: NeedsArguments(7, where="here"),
        "locked": Locked,
        "unreadable": UnreadableError,
        "exit": lambda: SystemExit(3),
        "exit-zero": lambda: SystemExit(0),
        "interrupt": KeyboardInterrupt,
        "cancelled": asyncio.CancelledError,
        "generator": GeneratorExit,
        "group": lambda: ExceptionGroup("several", [ValueError("one"), TypeError("two")]),
        "memory": MemoryError,
    }
    raise makers[kind]()


def throw_odd(job: RunningJob) -> int:
    """Raise for odd numbers."""
    if job["x"] % 2:
        raise ValueError(job["x"])
    return int(job["x"])


def _endless(depth: int) -> int:
    return _endless(depth + 1) + 1


def die(job: RunningJob) -> Any:
    """Take the process down, if ``how`` says so."""
    how = job.get("how")
    if how == "exit":
        os._exit(3)
    elif how == "abort":
        os.abort()
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return job["x"]


def die_at_first(job: RunningJob) -> int:
    """Take the process down in the first attempts."""
    if job.attempt < job["times"]:
        os._exit(4)
    return job.attempt


def fail_at_first(job: RunningJob) -> int:
    """Raise in the first attempts."""
    if job.attempt < job["times"]:
        raise ValueError(f"attempt {job.attempt}")
    return job.attempt


def fail_with_records(job: RunningJob) -> NoReturn:
    """Record, then fail in the way that ``how`` says."""
    job.record(step=0, loss=1.5)
    job.record(step=1, loss=0.5)
    if job["how"] == "exit":
        os._exit(5)
    raise ValueError("after two steps")


def lock_in_output(_job: RunningJob) -> dict[str, Any]:
    """Return what does not pickle."""
    return {"fine": 1, "model": {"lock": threading.Lock()}}


def unloadable(_job: RunningJob) -> WontLoad:
    """Return what does not unpickle."""
    return WontLoad()


# -- what takes its time ----------------------------------------------------------------------------------------------


def hold(job: RunningJob) -> Steps:
    """Create the file ``started``, with the process id, wait for the file ``release``, and create the file
    ``finished``; be deaf to requests.
    """
    if "started" in job:
        _touch(job["started"], str(os.getpid()))
    if "release" in job:
        yield from _until(job["release"])
    if "finished" in job:
        _touch(job["finished"])
    return job.get("x")


def start_children(job: RunningJob) -> Steps:
    """Start a child, and one in a session of its own that has one too; tell who they all are, and go on for ever."""
    code = "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; "
    code += "time.sleep(600)']); print(child.pid, flush=True); time.sleep(600)"
    plain = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    moved = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)
    if moved.stdout is None:
        raise RuntimeError("it has no pipe")
    _touch(job["started"], f"{os.getpid()} {plain.pid} {moved.pid} {moved.stdout.readline()}")
    yield from _until(job["release"])


def chatter(job: RunningJob) -> Steps:
    """As :func:`hold`, but print."""
    print(job["x"], "started")  # noqa: T201 - what it is for
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    _touch(job["started"], str(os.getpid()))
    yield from _until(job["release"])
    print(job["x"], "released", file=sys.stderr)  # noqa: T201 - as above


def heed(job: RunningJob) -> Steps:
    """As :func:`hold`, but record, and stop when asked to."""
    job.record(step=0)
    job.report(0.5, "half way")
    if "started" in job:
        _touch(job["started"], str(os.getpid()))
    deadline = time.monotonic() + PATIENCE
    while not job.stopped():
        if os.path.exists(job["release"]):
            return "released"
        if time.monotonic() > deadline:
            raise TimeoutError("it was neither stopped nor released")
        yield
    job.record(step=1)
    return "stopped"


def die_beside(job: RunningJob) -> Steps:
    """Once the file ``after`` is there, take the process down; without one, record and do as :func:`hold`."""
    if "after" in job:
        yield from _until(job["after"])
        _touch(job["started"], str(os.getpid()))
        os._exit(6)
    job.record(step=0)
    yield from hold(job)
    job.record(step=1)
    return "unharmed"


def linger(job: RunningJob) -> Steps:
    """Be deaf, and speak when the next attempt runs; which waits for that."""
    if job.attempt == 0:
        try:
            yield from _until(job["again"])
            job.record(step=0)
            job.report(0.9, "the first")
        finally:  # also of a coroutine that was cancelled
            _touch(job["said"])
        return "the first"
    job.report(0.1, "the second")
    _touch(job["again"])
    yield from _until(job["said"])
    job.record(step=1)
    return "the second"


def tell(job: RunningJob) -> Steps:
    """Record and report in stages, each of which waits for the test."""
    for stage in range(3):
        job.record(stage=stage)
        job.report(stage / 4, f"stage {stage}")
        yield from _until(job[f"go{stage}"])
    return "told"


def admit(job: RunningJob) -> Steps:
    """Show itself, and wait until as many as ``expected`` are there: proof that they run at once."""
    _touch(os.path.join(job["room"], job.id))
    deadline = time.monotonic() + PATIENCE
    while len([name for name in os.listdir(job["room"]) if not name.endswith(".new")]) < job["expected"]:
        if time.monotonic() > deadline:
            raise TimeoutError("the others never came")
        yield
    return "met"


def nap(job: RunningJob) -> Steps:
    """Take ``seconds``, and do not ask whether to stop."""
    end = time.monotonic() + job["seconds"]
    while time.monotonic() < end:
        yield
    return job["seconds"]


def late_at_first(job: RunningJob) -> Steps:
    """Take ``seconds`` at the first attempt, without asking whether to stop; later return whether to stop."""
    if job.attempt == 0:
        yield from nap(job)
        return "late"
    return job.stopped()


async def slow_square(job: RunningJob) -> float:
    """A coroutine function, as users write them."""
    await asyncio.sleep(0.01)
    return float(job["x"] ** 2)


# -- resources --------------------------------------------------------------------------------------------------------


def occupy(job: RunningJob) -> Steps:
    """Have each unit to itself for a moment, or fail; return the resources, and which GPU libraries would see."""
    os.makedirs(job["units"], exist_ok=True)
    marks = [os.path.join(job["units"], f"{kind}-{unit}") for kind, unit in job.resources.items()]
    for mark in marks:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    yield
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for mark in marks:
        os.unlink(mark)
    return {"resources": job.resources, "visible": visible}


def await_others(job: RunningJob) -> Steps:
    """Return how many of the jobs that share the directory ``others`` ran at once, this one included."""
    os.makedirs(job["others"], exist_ok=True)
    mine = os.path.join(job["others"], os.path.basename(job["started"]))
    _touch(mine)
    count = len(os.listdir(job["others"]))
    _touch(job["started"], str(os.getpid()))
    yield from _until(job["release"])
    count = max(count, len(os.listdir(job["others"])))
    os.unlink(mine)
    return count


def end_in_some_way(job: RunningJob) -> Any:
    """End as ``way`` says."""
    way = job["way"]
    if way.endswith("at first") and job.attempt:
        way = "return"
    if way.startswith("raise"):
        raise ValueError(way)
    if way.startswith("die"):
        os._exit(5)
    if way == "exit":
        raise SystemExit(3)
    return threading.Lock() if way == "unknown output" else way


def follow(job: RunningJob) -> Steps:
    """Return whether the file ``before`` exists when this starts; or, without it, as :func:`hold`, and create the file
    ``over`` at the end, however it comes.
    """
    if "before" in job:
        return os.path.exists(job["before"])
    try:
        return (yield from hold(job))
    finally:
        _touch(job["over"])
