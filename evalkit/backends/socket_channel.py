"""SocketChannel: the side channel to worker processes of this machine, over a Unix socket of this user's.

::

    worker ──messages──▶ channel thread ──▶ receive
           ◀──numbers of the runs that are to stop──

A worker connects at its first word, to the path that its client was pickled with. The sockets of the master belong to
one thread; a worker has a thread that waits for requests, and for the end of the master.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from evalkit.backends.peers import Peer, PeerAddress, Peers, connect_peer, frame, remove_address
from evalkit.backends.side_channel import Receive, SideChannel, SideChannelClient

__all__ = ["SocketChannel"]

_log = logging.getLogger("evalkit")

_RUN = struct.Struct("<Q")  # the number of one
_CONNECT_TIMEOUT = 10.0  # seconds


class SocketChannel(SideChannel):
    """The side channel to worker processes of this machine."""

    def __init__(self) -> None:
        self._peers = Peers()
        self.client = _SocketClient(self._peers.address)
        self._workers: set[Peer] = set()
        self._commands: deque[Callable[[], None]] = deque()
        self._stops: dict[int, None] = {}  # that workers which connect later have to hear of
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="evalkit-side-channel", daemon=True)

    def start(self, receive: Receive) -> None:
        self._receive = receive
        self._thread.start()

    def request_stop(self, run: int) -> None:
        self._do(lambda: self._tell_all(run))

    def forget(self, run: int) -> None:
        self._do(lambda: self._stops.pop(run, None))

    def drain(self, timeout: float) -> None:
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            drained = threading.Event()
            self._do(lambda: self._read_all(time.monotonic() + timeout, drained))
            drained.wait(timeout)

    def close(self) -> None:
        self._closed = True
        self._peers.wake()
        if not self._thread.is_alive():
            self._peers.close()
        elif threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _do(self, command: Callable[[], object]) -> None:
        """Have the thread of the channel do something."""
        self._commands.append(command)  # type: ignore[arg-type]
        self._peers.wake()

    # -- in the thread of the channel -----------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._closed:
                self._turn(None)
                while self._commands:
                    self._commands.popleft()()
        except Exception:  # noqa: BLE001 - a defect of ours
            _log.exception("the side channel failed; what jobs say comes with their results")
        finally:
            self._closed = True
            self._peers.close()

    def _turn(self, timeout: float | None) -> bool:
        """Handle what there is; say whether there was anything but a command."""
        heard = self._peers.turn(timeout)
        for peer, messages in heard or ():
            if messages is None:
                self._workers.discard(peer)
                self._peers.drop(peer)
                continue
            if peer not in self._workers:
                self._workers.add(peer)
                self._peers.send(peer, b"".join(map(_RUN.pack, self._stops)))
            for message in messages:
                self._receive(message)
        return heard is not None

    def _tell_all(self, run: int) -> None:
        self._stops[run] = None
        for peer in self._workers:
            self._peers.send(peer, _RUN.pack(run))

    def _read_all(self, until: float, drained: threading.Event) -> None:
        # On one machine, what was sent is here. A worker that never pauses must not keep us.
        for _ in range(1000):
            if self._closed or time.monotonic() > until or not self._turn(0.0):
                break
        drained.set()


class _SocketClient(SideChannelClient):
    def __init__(self, address: PeerAddress) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._pid = 0
        self._stops: set[int] = set()
        self._gone = False  # the master has
        self._closed = False

    def __reduce__(self) -> tuple[type[_SocketClient], tuple[PeerAddress]]:
        return _SocketClient, (self._address,)

    def send(self, message: bytes) -> None:
        sock = self._connected()
        if sock is None:
            raise ConnectionError("there is no way to the main process from here")
        with self._lock:
            sock.sendall(frame(message))

    def stop_requested(self, run: int) -> bool:
        if not self._pid:
            self._connected()
        return self._gone or run in self._stops

    def close(self) -> None:
        if self._sock is not None and self._pid == os.getpid():
            self._closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # and so the thread ends, and lets go of the descriptor
            self._thread.join(1.0)
            self._sock.close()

    def _connected(self) -> socket.socket | None:
        """The connection; None in a child that the user's function forked, and where there is no way."""
        if self._pid:
            return self._sock if self._pid == os.getpid() else None
        with self._lock:
            if not self._pid:
                try:
                    self._sock = sock = connect_peer(self._address, os.getpid(), _CONNECT_TIMEOUT)
                except OSError as exc:
                    _log.warning("no side channel to the main process: %s; what jobs say comes with their results", exc)
                else:
                    self._thread = threading.Thread(
                        target=self._listen, args=(sock,), name="evalkit-stops", daemon=True
                    )
                    self._thread.start()
                self._pid = os.getpid()
        return self._sock

    def _listen(self, sock: socket.socket) -> None:
        partial = b""
        try:
            while data := sock.recv(4096):
                data = partial + data
                whole = len(data) - len(data) % _RUN.size
                partial = data[whole:]
                self._stops.update(run for (run,) in _RUN.iter_unpack(data[:whole]))
        except ConnectionError:
            pass
        except OSError:  # a job has closed the descriptor, and nothing is heard any more
            return
        self._gone = True
        if not self._closed:
            remove_address(self._address)  # the master may have been killed
