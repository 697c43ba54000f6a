"""What overhead.py measures: the same no-op jobs through evalkit and through its peers, one function a way of doing
it.

Every case is called with a number of jobs and returns a :class:`Sample`. Two workers each; the workers are up and
have run some jobs before the clock starts, and closing is not timed.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

__all__ = ["CASES", "WORKERS", "Case", "Sample", "missing"]

WORKERS = 2
WARM_UP = 256  # jobs run before the clock starts, once all workers are up
EVALKIT_LIMIT = 1_000_000
PPE_LIMIT = 10_000  # some 3 to 5 s at that size
DEEPHYPER_LIMITS = {"ALL": 10_000, "BATCH": 1_000}  # its cost per job grows with the number of jobs

Args = list[dict[str, float]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement.

    Attributes:
        seconds: from the first submit to the last result, for all jobs.
        peak_bytes: by how much the resident memory of the measuring process had grown at its peak; without workers.
    """

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """One way of running jobs.

    Attributes:
        name: "<library> <engine>".
        mode: "ALL" (submit all, wait for all) or "BATCH" (two out; at each result, submit the next).
        run: called with the number of jobs.
        limit: the most jobs it is given; larger sizes are left out.
        needs: the module to be installed; for evalkit, "backend:<name>".
        launcher: what starts it, before the interpreter.
    """

    name: str
    mode: str
    run: Callable[[int], Sample]
    limit: int = EVALKIT_LIMIT
    needs: str = ""
    launcher: tuple[str, ...] = ()


def missing(case: Case) -> str | None:
    """Why a case cannot run here; None if it can."""
    kind, _, backend = case.needs.partition(":")
    if kind == "backend":
        from evalkit.plugins import plugins

        try:
            plugins().backend_class(backend)
        except ValueError as exc:
            return str(exc)
    elif kind and importlib.util.find_spec(kind) is None:
        return f"{kind} is not installed"
    return None


# -- the job ----------------------------------------------------------------------------------------------------------


def noop(job: Any) -> int:
    """Does nothing; but with x < 0, to bring all workers up, it says which worker it is, after so long."""
    x = job["x"]
    if x < 0:
        time.sleep(-x)
        return os.getpid()
    return 0


async def async_noop(job: Any) -> int:
    return 0 if job["x"] >= 0 else 1


def parameters(n: int) -> Args:
    return [{"x": float(i)} for i in range(n)]


def warm(call_all: Callable[[Args], Iterable[Any]], processes: bool = False) -> None:
    """Run jobs until every worker process has run one, then some more."""
    seen: set[Any] = set()
    while processes and len(seen) < WORKERS:
        seen.update(call_all([{"x": -0.2}] * WORKERS))
    for _ in call_all(parameters(WARM_UP)):
        pass


def peak_memory() -> int:
    """The peak resident memory of this program, in bytes."""
    try:
        # getrusage() counts what the parent had when it started this program.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(action: Callable[[], Any]) -> Sample:
    gc.collect()
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - start
    peak = peak_memory()
    del kept  # results count as long as the clock runs
    return Sample(seconds, max(0, peak - before))


# -- evalkit, and what has the same interface -------------------------------------------------------------------------


def run_evaluator(evaluator: Any, mode: str, n: int, processes: bool) -> Sample:
    def call_all(args: Args) -> Iterator[Any]:
        evaluator.submit(args)
        return (job.output for job in evaluator.gather("ALL"))

    def all_at_once() -> Any:
        jobs = evaluator.submit(args)
        done = evaluator.gather("ALL")
        if len(done) != n:
            raise RuntimeError(f"{len(done)} of {n} jobs came back")
        return jobs, done

    def two_out() -> None:
        evaluator.submit(args[:WORKERS])
        sent, back = WORKERS, 0
        while back < n:
            done = len(evaluator.gather("BATCH", 1))
            back += done
            if sent < n:
                evaluator.submit(args[sent : sent + done])
                sent += done

    warm(call_all, processes)
    args = parameters(n)
    return measured(all_at_once if mode == "ALL" else two_out)


def evalkit(method: str, mode: str, n: int, function: Callable[..., Any] = noop) -> Sample | None:
    from evalkit import Evaluator

    with Evaluator.create(function, method, {"num_workers": WORKERS}) as evaluator:
        if not evaluator.is_master:
            return None
        return run_evaluator(evaluator, mode, n, processes=method not in ("serial", "thread"))


def deephyper(method: str, mode: str, n: int, function: Callable[..., Any] = noop) -> Sample:
    from deephyper.evaluator import Evaluator

    evaluator = Evaluator.create(function, method=method, method_kwargs={"num_workers": WORKERS})
    try:
        return run_evaluator(evaluator, mode, n, processes=False)
    finally:
        evaluator.close()


# -- executors --------------------------------------------------------------------------------------------------------


def run_executor(executor: Any, wait: Callable[..., Any], mode: str, n: int, processes: bool) -> Sample:
    """One task a job; ``wait(pending)`` returns (done, pending) once one has ended."""

    def call_all(args: Args) -> list[Any]:
        return [future.result() for future in [executor.submit(noop, one) for one in args]]

    def two_out() -> None:
        waiting = iter(args)
        pending = {executor.submit(noop, next(waiting)) for _ in range(WORKERS)}
        while pending:
            done, pending = wait(pending)
            for future in done:
                future.result()
                for one in waiting:
                    pending.add(executor.submit(noop, one))
                    break

    warm(call_all, processes)
    args = parameters(n)
    return measured(partial(call_all, args) if mode == "ALL" else two_out)


def futures(kind: str, mode: str, n: int) -> Sample:
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait

    first = partial(wait, return_when=FIRST_COMPLETED)
    with (ProcessPoolExecutor if kind == "process" else ThreadPoolExecutor)(WORKERS) as executor:
        return run_executor(executor, first, mode, n, processes=kind == "process")


def loky(mode: str, n: int) -> Sample:
    from concurrent.futures import FIRST_COMPLETED, wait

    from loky import get_reusable_executor

    executor = get_reusable_executor(WORKERS)
    try:
        return run_executor(executor, partial(wait, return_when=FIRST_COMPLETED), mode, n, processes=True)
    finally:
        executor.shutdown()


def mpi(mode: str, n: int) -> Sample | None:
    from concurrent.futures import FIRST_COMPLETED, wait

    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor() as executor:
        if executor is None:
            return None
        return run_executor(executor, partial(wait, return_when=FIRST_COMPLETED), mode, n, processes=True)


# -- the others -------------------------------------------------------------------------------------------------------


def joblib(n: int) -> Sample:
    from joblib import Parallel, delayed

    with Parallel(n_jobs=WORKERS, backend="loky") as parallel:

        def call_all(args: Args) -> list[Any]:
            return list(parallel(delayed(noop)(one) for one in args))

        warm(call_all, processes=True)
        args = parameters(n)
        return measured(partial(call_all, args))


def pool(n: int) -> Sample:
    from multiprocessing import Pool

    with Pool(WORKERS) as workers:

        def call_all(args: Args) -> list[Any]:
            return list(workers.imap_unordered(noop, args, chunksize=1 if args[0]["x"] < 0 else 64))

        warm(call_all, processes=True)
        args = parameters(n)
        return measured(partial(call_all, args))


def ray(mode: str, n: int) -> Sample:
    import ray as engine

    engine.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    task = engine.remote(noop)

    def call_all(args: Args) -> list[Any]:
        return list(engine.get([task.remote(one) for one in args]))

    def two_out() -> None:
        waiting = iter(args)
        pending = [task.remote(next(waiting)) for _ in range(WORKERS)]
        while pending:
            done, pending = engine.wait(pending)
            engine.get(done)
            for one in waiting:
                pending.append(task.remote(one))
                break

    try:
        warm(call_all, processes=True)
        args = parameters(n)
        return measured(partial(call_all, args) if mode == "ALL" else two_out)
    finally:
        engine.shutdown()


# -- all of them ------------------------------------------------------------------------------------------------------


def _cases() -> Iterator[Case]:
    mpiexec = ("mpiexec", "-n", str(WORKERS + 1))
    for mode in ("ALL", "BATCH"):
        yield Case("evalkit serial", mode, partial(evalkit, "serial", mode))
        yield Case("evalkit serial-async", mode, partial(evalkit, "serial", mode, function=async_noop))
        yield Case("evalkit thread", mode, partial(evalkit, "thread", mode))
        yield Case("evalkit process", mode, partial(evalkit, "process", mode))
        for name in ("loky", "ray"):
            yield Case(f"evalkit {name}", mode, partial(evalkit, name, mode), needs=f"backend:{name}")
        mpicomm = partial(evalkit, "mpicomm", mode)
        yield Case("evalkit mpicomm", mode, mpicomm, needs="backend:mpicomm", launcher=mpiexec)

        yield Case("ThreadPoolExecutor", mode, partial(futures, "thread", mode))
        yield Case("ProcessPoolExecutor", mode, partial(futures, "process", mode), PPE_LIMIT)
        if mode == "ALL":
            yield Case("joblib", mode, joblib, needs="joblib")
            yield Case("Pool.imap_unordered", mode, pool)
        yield Case("loky", mode, partial(loky, mode), PPE_LIMIT, needs="loky")
        yield Case("ray", mode, partial(ray, mode), PPE_LIMIT, needs="ray")
        yield Case("mpi4py", mode, partial(mpi, mode), PPE_LIMIT, needs="mpi4py", launcher=mpiexec)
        limit = DEEPHYPER_LIMITS[mode]
        asynchronous = partial(deephyper, "serial", mode, function=async_noop)
        yield Case("deephyper serial-async", mode, asynchronous, limit, needs="deephyper")
        yield Case("deephyper thread", mode, partial(deephyper, "thread", mode), limit, needs="deephyper")
        yield Case("deephyper process", mode, partial(deephyper, "process", mode), 1_000, needs="deephyper")


#: "<name>/<mode>" -> case.
CASES = {f"{case.name}/{case.mode}": case for case in _cases()}
