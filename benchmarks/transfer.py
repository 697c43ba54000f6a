"""How fast a large array goes to a worker process: MB/s beside a raw socket and ProcessPoolExecutor.

    python benchmarks/transfer.py                      # 10 MB, five rounds
    python benchmarks/transfer.py --megabytes 100 --transfers 10 --json transfer.json

Needs numpy. Arrays go in one after the other, each to a worker that is up and answers when it has all of it; the answer
is one number. Each measurement has a process of its own; rounds are interleaved; figures are medians. The raw socket
is a socket pair between two processes, into memory of its own for each array: what any transport on one has to pay.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from measure import MeasurementError, in_fresh_process, machine, median, print_table, spread, write_json

__all__ = ["main", "sample"]

BAR = 0.8  # of what the raw socket moves


def length(job: Any) -> int:
    """The run function: how many bytes arrived, the last one read."""
    array = job["array"]
    return int(array.nbytes) + int(array[-1])


def timed(send: Callable[[Any], int], count: int, nbytes: int) -> float:
    """Seconds for ``count`` arrays; the first one more, to warm up, is not timed."""
    import numpy as np

    arrays = [np.full(nbytes, value, dtype=np.uint8) for value in range(4)]  # written, so that there are pages to read
    send(arrays[0])
    start = time.perf_counter()
    for number in range(count):
        if send(arrays[number % 4]) < nbytes:
            raise MeasurementError("not all of it arrived")
    return time.perf_counter() - start


def through_evalkit(count: int, nbytes: int) -> float:
    from evalkit import Evaluator

    with Evaluator.create(length, "process", {"num_workers": 1, "storage": "null://"}) as evaluator:

        def send(array: Any) -> int:
            evaluator.submit([{"array": array}])
            (job,) = evaluator.gather("ALL")
            return int(job.get_results())

        return timed(send, count, nbytes)


def through_process_pool(count: int, nbytes: int) -> float:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as executor:
        return timed(lambda array: executor.submit(length, {"array": array}).result(), count, nbytes)


def through_loky(count: int, nbytes: int) -> float:
    from loky import get_reusable_executor

    executor = get_reusable_executor(1)
    try:
        return timed(lambda array: executor.submit(length, {"array": array}).result(), count, nbytes)
    finally:
        executor.shutdown()


def through_socket(count: int, nbytes: int) -> float:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        while _swallow(theirs, nbytes):
            theirs.sendall(b"\0")
        os._exit(0)
    theirs.close()

    def send(array: Any) -> int:
        ours.sendall(array)
        ours.recv(1)
        return nbytes

    try:
        return timed(send, count, nbytes)
    finally:
        ours.close()
        os.waitpid(child, 0)


def _swallow(sock: socket.socket, nbytes: int) -> bool:
    """Receive one array; say whether there was one."""
    view = memoryview(bytearray(nbytes))
    while view:
        received = sock.recv_into(view)
        if not received:
            return False
        view = view[received:]
    return True


WAYS: dict[str, Callable[[int, int], float]] = {
    "raw socket": through_socket,
    "evalkit process": through_evalkit,
    "ProcessPoolExecutor": through_process_pool,
    "loky": through_loky,
}


def sample(way: str, count: int, nbytes: int) -> float:
    """MB/s, once; called in a process of its own."""
    return count * nbytes / 1e6 / WAYS[way](count, nbytes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10.0, metavar="MB", help="of one array")
    parser.add_argument("--transfers", type=int, default=50, metavar="N", help="arrays a measurement")
    parser.add_argument("--rounds", type=int, default=5, metavar="K", help="measurements of each; the median counts")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there as well")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("numpy") is None:
        print("numpy is not installed: nothing to send")
        return 1
    ways = [way for way in WAYS if way != "loky" or importlib.util.find_spec("loky") is not None]
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            samples[way].append(
                in_fresh_process("transfer", "sample", way, options.transfers, int(options.megabytes * 1e6))
            )
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    socket_speed = median(samples["raw socket"])
    rows = []
    for way, values in samples.items():
        ratio = median(values) / socket_speed
        verdict = "" if way != "evalkit process" else "ok" if ratio >= BAR else "BELOW THE BAR"
        bar = f"{BAR:.2f}" if way == "evalkit process" else ""
        rows.append([way, f"{median(values):,.0f}", spread(values), f"{ratio:.2f}", bar, verdict])
    head = ["through", "MB/s", "range", "of the socket", "bar", ""]
    print_table(f"{options.megabytes:g} MB arrays into one worker", head, rows)
    if options.json:
        write_json(options.json, {"megabytes": options.megabytes, "transfers": options.transfers, "samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(main())
