"""LoopbackChannel: the side channel to worker processes of this machine, over sockets that only they can use.

::

    worker ──token, then messages──▶ channel thread ──▶ receive
           ◀──numbers of the runs that are to stop──

A worker connects at the first word, with the token that its client was pickled with; who does not know it is not
listened to. The sockets of the master belong to one thread.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from evalkit.backends.side_channel import Receive, SideChannel, SideChannelClient

__all__ = ["LoopbackChannel"]

_log = logging.getLogger("evalkit")

_HOST = "127.0.0.1"
_LENGTH = struct.Struct("<Q")  # before each message of a worker; and the number of a run
_TOKEN_BYTES = 32
_READ_BYTES = 2**18
_CONNECT_TIMEOUT = 10.0  # seconds
_POLL = 0.001  # seconds; asking the socket takes as long as several jobs that do nothing


class LoopbackChannel(SideChannel):
    """The side channel to worker processes of this machine."""

    def __init__(self) -> None:
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._listener = socket.create_server((_HOST, 0), backlog=128)
        self._listener.setblocking(False)
        self.client = _LoopbackClient(self._listener.getsockname()[1], self._token)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._received = memoryview(bytearray(_READ_BYTES))  # one for all: a new one for each read is slow to get
        self._peers: dict[socket.socket, _Peer] = {}
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
            self._do(lambda: self._read_all(drained))
            drained.wait(timeout)

    def close(self) -> None:
        self._closed = True
        self._do(lambda: None)
        if not self._thread.is_alive():
            self._release()
        elif threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _do(self, command: Callable[[], object]) -> None:
        """Have the thread of the channel do something."""
        self._commands.append(command)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):  # it is about to look, or it is closed
            self._wake_writer.send(b"\0")

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
            self._release()

    def _turn(self, timeout: float | None) -> bool:
        """Handle what there is; say whether there was anything but a command."""
        heard = False
        for key, mask in self._selector.select(timeout):
            if key.fileobj is self._listener:
                heard = True
                self._accept()
            elif key.fileobj is self._wake_reader:
                with contextlib.suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
            else:
                heard = True
                self._serve_peer(key.data, mask)
        return heard

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it has gone again, or there are no descriptors left
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = self._peers[sock] = _Peer(sock)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _serve_peer(self, peer: _Peer, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._write(peer)
            if mask & selectors.EVENT_READ:
                self._read(peer)
        except OSError:  # the worker has gone
            self._drop(peer)

    def _read(self, peer: _Peer) -> None:
        try:
            n = peer.sock.recv_into(self._received)
        except BlockingIOError:
            return
        if not n:
            raise ConnectionResetError
        peer.incoming += self._received[:n]
        if not peer.known:
            if not hmac.compare_digest(peer.incoming[:_TOKEN_BYTES], self._token[: len(peer.incoming)]):
                raise ConnectionRefusedError
            if len(peer.incoming) < _TOKEN_BYTES:
                return
            del peer.incoming[:_TOKEN_BYTES]
            peer.known = True
            for run in self._stops:
                peer.outgoing += _LENGTH.pack(run)
            self._write(peer)
        for message in peer.messages():
            self._receive(message)

    def _write(self, peer: _Peer) -> None:
        with contextlib.suppress(BlockingIOError):
            while peer.outgoing:
                del peer.outgoing[: peer.sock.send(peer.outgoing)]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outgoing else 0)
        if self._selector.get_key(peer.sock).events != events:
            self._selector.modify(peer.sock, events, peer)

    def _tell_all(self, run: int) -> None:
        self._stops[run] = None
        for peer in list(self._peers.values()):
            if peer.known:
                peer.outgoing += _LENGTH.pack(run)
                try:
                    self._write(peer)
                except OSError:
                    self._drop(peer)

    def _read_all(self, drained: threading.Event) -> None:
        # On one machine, what was sent is here. A worker that never pauses must not keep us.
        for _ in range(1000):
            if not self._turn(0):
                break
        drained.set()

    def _drop(self, peer: _Peer) -> None:
        if self._peers.pop(peer.sock, None) is not None:
            self._selector.unregister(peer.sock)
            peer.sock.close()

    def _release(self) -> None:
        self._closed = True
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._selector.close()
        for sock in (self._listener, self._wake_reader, self._wake_writer):
            sock.close()


class _Peer:
    """A worker that has connected."""

    __slots__ = ("incoming", "known", "outgoing", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.known = False
        self.incoming = bytearray()
        self.outgoing = bytearray()

    def messages(self) -> list[bytes]:
        """The messages that are whole."""
        messages: list[bytes] = []
        at = 0
        while len(self.incoming) >= at + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self.incoming, at)
            start = at + _LENGTH.size
            if len(self.incoming) < start + length:
                break
            messages.append(bytes(self.incoming[start : start + length]))
            at = start + length
        if at:
            del self.incoming[:at]
        return messages


class _LoopbackClient(SideChannelClient):
    def __init__(self, port: int, token: bytes) -> None:
        self._port = port
        self._token = token
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._pid = 0
        self._stops: set[int] = set()
        self._partial = b""
        self._polled = 0.0
        self._gone = False  # the master has

    def __reduce__(self) -> tuple[type[_LoopbackClient], tuple[int, bytes]]:
        return _LoopbackClient, (self._port, self._token)

    def send(self, message: bytes) -> None:
        sock = self._connected()
        if sock is None:
            raise ConnectionError("there is no way to the main process from here")
        with self._lock:
            sock.sendall(_LENGTH.pack(len(message)) + message)

    def stop_requested(self, run: int) -> bool:
        now = time.monotonic()
        if now - self._polled >= _POLL and not self._gone:
            self._polled = now
            sock = self._connected()
            # Who does not get the lock need not read: another thread is at it.
            if sock is not None and self._lock.acquire(blocking=False):
                try:
                    self._read_stops(sock)
                finally:
                    self._lock.release()
        return self._gone or run in self._stops

    def close(self) -> None:
        if self._sock is not None and self._pid == os.getpid():
            self._sock.close()

    def _connected(self) -> socket.socket | None:
        """The connection; None in a child that the user's function forked, and where there is no way."""
        if self._pid:
            return self._sock if self._pid == os.getpid() else None
        with self._lock:
            if not self._pid:
                try:
                    sock = socket.create_connection((_HOST, self._port), _CONNECT_TIMEOUT)
                    sock.settimeout(None)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sock.sendall(self._token)
                    self._sock = sock
                except OSError as exc:
                    _log.warning("no side channel to the main process: %s; what jobs say comes with their results", exc)
                self._pid = os.getpid()
        return self._sock

    def _read_stops(self, sock: socket.socket) -> None:
        try:
            while True:
                data = sock.recv(4096, socket.MSG_DONTWAIT)
                if not data:
                    self._gone = True
                    return
                data = self._partial + data
                whole = len(data) - len(data) % _LENGTH.size
                self._partial = data[whole:]
                self._stops.update(run for (run,) in _LENGTH.iter_unpack(data[:whole]))
        except BlockingIOError:
            return
        except OSError:
            self._gone = True
