"""Running the programs of the fault table, each in a folder and under a mark of its own, and judging what they did."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from fault_backends import SENT, Backend, Run
from fault_jobs import CHILDREN
from fault_table import RED, Cells

from evalkit.plugins import plugins
from evalkit.testing.processes import Mark

__all__ = ["observe"]

BOUND = 60.0  # seconds that a fault may take; machines of many users are slow
_PROGRAM = 600.0  # seconds for a program of many faults
_LINGER = 5.0  # seconds that processes may outlive the program
_STANDSTILL = 2.0  # seconds after SIGTERM in which a program that cannot run does not end
_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]

#: How a fault ends its job where the engine can do all that there is to do.
_CAUSES = {
    **dict.fromkeys(("sigkill", "sigsegv", "os._exit", "descriptors"), "FAILED/CRASH"),
    **dict.fromkeys(("exception", "unpicklable", "sys.exit", "rebuild-exits", "rebuild-hangs"), "FAILED/EXCEPTION"),
    **dict.fromkeys(("hang", "hang-c", "hang-deaf", "children-hang"), "FAILED/TIMEOUT"),
    **dict.fromkeys(("children", "streams", "disk", "unstorable", "held"), "DONE"),
    "memory": "FAILED/MEMORY",
}


def observe(backend: Backend, run: Run, folder: Path) -> dict[str, Cells]:
    """Meet the faults of a run, and say what has become of each."""
    programs = Programs(backend, run, folder)
    try:
        return resume(programs) if run.resumed else outlive(programs)
    finally:
        for process in programs.left(0.0):
            process.kill()


class Programs:
    """Starts programs on a backend.

    Args:
        folder: where they run.
    """

    def __init__(self, backend: Backend, run: Run, folder: Path) -> None:
        self.backend = backend
        self.run = run
        self.folder = folder
        self.mark = Mark()
        self.environment = (
            os.environ
            | self.mark.environment
            | {
                "EVALKIT_FAULTS": str(folder),
                "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_HERE)]),
            }
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """As the leader of a process group; what it prints goes into the file ``printed``."""
        with (self.folder / "printed").open("ab") as printed:
            return subprocess.Popen(
                self.backend.command(self.run.ranks, *arguments),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )

    def left(self, patience: float) -> list[psutil.Process]:
        """What is still there when the time is up, but for the children that the engine need not end."""
        deadline = time.monotonic() + patience
        while True:
            left = self.mark.processes()
            if not any(self.unexpected(process) for process in left) or time.monotonic() > deadline:
                return left
            time.sleep(0.05)

    def unexpected(self, process: psutil.Process) -> bool:
        return fault_of(process) not in self.backend.leaves

    def say_left(self, fault: str, left: list[psutil.Process]) -> str:
        children = sum(fault_of(process) == fault for process in left)
        strangers = [process for process in left if fault_of(process) is None]
        if strangers:
            return RED + ", ".join(f"{process.pid} {' '.join(process.cmdline())[:60]}" for process in strangers)
        if fault in self.backend.leaves:
            # How many is the launcher's business: mpiexec ends those that stayed in the group of their rank.
            return "its children, which are its own" if 0 < children <= CHILDREN else f"{RED}{children} children"
        return f"{RED}{children} children" if children else "nothing"

    def printed(self) -> str:
        return (self.folder / "printed").read_text(errors="replace")[-3000:]


def fault_of(process: psutil.Process) -> str | None:
    """The fault whose job started it as a child."""
    try:
        return process.environ().get("EVALKIT_FAULT")
    except psutil.Error:
        return None


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_until_readable(pipe: Path) -> None:
    if wait_for(pipe.exists, BOUND):
        descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            select.select([descriptor], [], [], BOUND)
        finally:
            os.close(descriptor)


def within(seconds: float | None) -> str:
    return f"{BOUND:g} s" if seconds is not None and seconds < BOUND else f"{RED}{seconds} s"


# -- an evaluator that outlives its faults ----------------------------------------------------------------------------


def outlive(programs: Programs) -> dict[str, Cells]:
    """Run a session, and judge what it saw."""
    backend, run = programs.backend, programs.run
    session = [str(_HERE / "fault_session.py"), backend.name, json.dumps(run.options), *run.faults]
    process = programs.start(*session)
    try:
        process.wait(_PROGRAM)
        ended = True
    except subprocess.TimeoutExpired:
        ended = False
        process.kill()
        process.wait()
    left = programs.left(_LINGER)
    seen_file = programs.folder / "seen.jsonl"
    lines = [json.loads(line) for line in seen_file.read_text().splitlines()] if seen_file.exists() else []
    seen = {line["fault"]: line for line in lines if "fault" in line}
    closed = next((line["closed"] for line in lines if "closed" in line), None)
    # Ranks that were abandoned end with the program, which the launcher tells by its exit code.
    good = ended and closed is not None and closed < BOUND and (process.returncode == 0 or bool(backend.abandons))
    cells = {}
    for number, fault in enumerate(run.faults):
        if fault not in seen:
            cells[fault] = Cells(*[RED + "it did not come to it: " + programs.printed().replace("\n", " ")] * 5)
            continue
        following = [*run.faults, ""][number + 1]
        cells[fault] = Cells(
            say_job(backend, fault, seen[fault]),
            "finish" if not seen[fault]["others"] and seen[fault]["returned"] else f"{RED}{seen[fault]['others']}",
            say_pool(backend, fault, seen[fault], seen.get(following)),
            programs.say_left(fault, left),
            within(seen[fault]["seconds"]) if good else f"{RED}closed {closed}, exit code {process.returncode}",
        )
    return cells


def say_job(backend: Backend, fault: str, seen: dict[str, Any]) -> str:
    said = seen["state"] if seen["cause"] is None else f"{seen['state']}/{seen['cause']}"
    expected = backend.causes.get(fault, _CAUSES[fault])
    if said != expected:
        return f"{RED}{said} {seen['error']}"
    kind, name, code = seen["error"] or (None, None, None)
    if "CRASH" in said:
        said += f", {name}" if name else f", exit code {code}" if code is not None else ""
    elif "EXCEPTION" in said:
        said += f", `{kind}`"
    if fault == "unstorable":
        stored = seen["stored"] == ["UnstorableValue", "DONE"]
        return "DONE; the record says what it was" if stored else f"{RED}{seen['stored']}"
    if fault == "disk":
        return "DONE, in `gather` once there is room" if seen["refused"] and seen["stored"] else RED + "not stored"
    if fault == "memory" and said == "DONE":
        return "DONE: `job_memory` is refused, the kernel decides" if seen["refused"] else RED + "not refused"
    return said + (", and is abandoned" if fault in backend.abandons else "")


def say_pool(backend: Backend, fault: str, seen: dict[str, Any], following: dict[str, Any] | None) -> str:
    if following is None or following["others"] or not following["returned"]:
        return f"{RED}{following}"
    if fault in backend.abandons:
        return f"{RED}it runs others" if seen["pid"] in following["pids"] else "goes on, with a rank less"
    return "the pool is whole"


# -- a command that is ended, and resumed -----------------------------------------------------------------------------


def resume(programs: Programs) -> dict[str, Cells]:
    """Give one command again and again: each fault ends it once, and at last it comes to its end."""
    faults = programs.run.faults
    found = {}
    for number, fault in enumerate(faults, 1):
        write_params(programs.folder / "jobs.jsonl", faults[:number])  # each run meets one more
        found[fault] = end_by(programs, fault)
    process = programs.start(*command(programs))
    try:
        code: int | None = process.wait(BOUND)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    done = Counter(record.args["x"] for record in records(programs.folder) if str(record.state) == "DONE")
    wrong = [x for x in range(5 * len(faults)) if done[x] != 1]
    rest = "run with `--resume`" if not wrong and code == 0 else f"{RED}exit code {code}, not once: {wrong}"
    if rest.startswith(RED):
        rest += programs.printed().replace("\n", " ")
    goes_on = "`--resume` goes on"
    return {
        fault: Cells(job, rest, goes_on if code == 0 else rest, left, bound)
        for fault, (job, left, bound) in found.items()
    }


def write_params(path: Path, faults: Any) -> None:
    """Five configurations for each fault, which is in the fourth of them."""
    rows = [
        {"x": 5 * number + n, "fault": fault if n == 3 else "", "once": True, "watched": False}
        for number, fault in enumerate(faults)
        for n in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(programs: Programs) -> list[str]:
    timeout = programs.run.options.get("job_timeout")
    return [
        *("-m", "evalkit", "run", str(_HERE / "fault_jobs.py:run"), "--params", "jobs.jsonl", "--search", "s"),
        *("--resume", "--storage", "sqlite:///study.db", "--backend", programs.backend.name, "--workers", "2"),
        *(() if timeout is None else ("--job-timeout", str(timeout))),
    ]


def records(folder: Path) -> list[Any]:
    storage = plugins().open_storage(f"sqlite:///{folder / 'study.db'}")
    try:
        return storage.load_jobs("s")
    finally:
        storage.close()


def end_by(programs: Programs, fault: str) -> tuple[str, str, str]:
    """Run the command until the fault ends it."""
    process = programs.start(*command(programs))
    reached = programs.folder / f"reached-{fault}"
    if not wait_for(lambda: reached.exists() or process.poll() is not None, BOUND):
        process.kill()
    start = time.monotonic()
    stood_still = False
    if not reached.exists():
        process.kill()
        process.wait()
        return RED + f"not reached, exit code {process.returncode} " + programs.printed().replace("\n", " "), "", ""
    if fault in SENT and not (fault == "descriptors" and programs.backend.mpi):
        if SENT[fault] == signal.SIGKILL and fault != "kill-master":
            if fault == "hang-c":
                wait_until_readable(programs.folder / "hang-c.pipe")  # until then it could still hear SIGTERM
            process.terminate()
            time.sleep(_STANDSTILL)
            stood_still = process.poll() is None
        if fault == "ctrl-c-group":
            os.killpg(process.pid, signal.SIGINT)
        else:
            master(programs, process).send_signal(SENT[fault])
    try:
        process.wait(BOUND)
        seconds: float | None = time.monotonic() - start
    except subprocess.TimeoutExpired:
        seconds = None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    left = programs.left(_LINGER)
    said = programs.say_left(fault, left)
    for child in left:  # or the next fault would be blamed for it
        child.kill()
    return say_end(programs, fault, process.returncode, stood_still), said, within(seconds)


def master(programs: Programs, process: subprocess.Popen[bytes]) -> psutil.Process | subprocess.Popen[bytes]:
    """The process that drives: the one that was started, or rank 0 under mpiexec."""
    if not programs.backend.mpi:
        return process
    (root,) = [one for one in programs.mark.processes() if one.environ().get("PMI_RANK") == "0"]
    return root


def say_end(programs: Programs, fault: str, code: int, stood_still: bool) -> str:
    states = [str(record.state) for record in records(programs.folder) if record.args["fault"] == fault]
    # The record of a start may not be written yet when the program dies; and whose files were closed may have lost it.
    state = states[-1] if states else "lost" if fault == "descriptors" else RED + "lost"
    state = "unfinished" if state in ("QUEUED", "RUNNING") else state
    if programs.backend.mpi and code:
        how = "the program ends" if fault not in ("ctrl-c", "ctrl-c-group") else "the program ends in good order"
    elif code < 0:
        how = f"the program ends by {signal.Signals(-code).name}"
    else:
        how = f"the program ends with {code}"
    if fault == "descriptors" and not programs.backend.mpi:
        lost = "the program has lost its own files, and is to be ended by SIGKILL"
        return f"{lost}; its record is not DONE" if state != "DONE" else RED + state
    if fault == "descriptors" and state in ("unfinished", "DONE"):
        return f"{how}; its record is DONE if its result came through before"
    if fault == "hang-c":
        how = "the program stands still until SIGKILL" if stood_still and code == -signal.SIGKILL else RED + how
    return f"{how}; its record is {state}"
