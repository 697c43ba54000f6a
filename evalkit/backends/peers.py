"""Peers: other processes of this user on this machine, over a Unix socket that nobody else can reach.

::

    peer ──a number of its own, then messages──▶ turn
         ◀──bytes─────────────────────────────── send

The socket is in a folder that only this user can enter, so the system keeps all others away before a byte is read.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import tempfile
import threading
import time
import weakref

__all__ = ["Peer", "PeerAddress", "Peers", "connect_peer", "frame", "remove_address"]

_LENGTH = struct.Struct("<Q")  # before each message
_NUMBER = struct.Struct("<Q")
_LONGEST_FOLDER = 80  # bytes; the path of a Unix socket has 103 at most, on some systems
_READ_BYTES = 2**18
_PAUSE = 0.01  # seconds before another try where somebody cannot be let in

_Socket = socket.socket  # as it is now: a job may put something else in its place, so as to have no network

#: The path of the socket.
PeerAddress = str


def frame(message: bytes) -> bytes:
    """A message as it is sent."""
    return _LENGTH.pack(len(message)) + message


def connect_peer(address: PeerAddress, number: int, timeout: float) -> socket.socket:
    """In another process: connect to the :class:`Peers` at this address.

    Args:
        number: what this peer is known by there.
        timeout: seconds; afterwards the socket has none.

    Raises:
        OSError: it does not answer.
    """
    sock = _Socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
        sock.settimeout(None)
        sock.sendall(_NUMBER.pack(number))
    except BaseException:
        sock.close()
        raise
    return sock


def remove_address(address: PeerAddress) -> None:
    """Remove the socket and its folder, if they are there."""
    with contextlib.suppress(OSError):
        os.unlink(address)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(address))


def _new_address(parent: str | None) -> PeerAddress:
    """Make a folder that only this user can enter; return the path of a socket in it."""
    parent = parent or tempfile.gettempdir()
    if len(os.fsencode(parent)) > _LONGEST_FOLDER:
        parent = "/tmp"  # noqa: S108 - mkdtemp takes a new name, and lets nobody else in
    return os.path.join(tempfile.mkdtemp(prefix="evalkit-", dir=parent), "socket")


class Peers:
    """The end that listens. All but :meth:`wake` belongs to one thread.

    Args:
        parent: where to make the folder of the socket; None for where temporary files are.

    Attributes:
        address: for :func:`connect_peer`.
    """

    def __init__(self, parent: str | None = None) -> None:
        self.address = _new_address(parent)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(self.address)
            self._listener.listen(128)
        except BaseException:
            self._listener.close()
            remove_address(self.address)
            raise
        self._listener.setblocking(False)
        self._woken, self._wake = socket.socketpair()
        self._waking = threading.RLock()  # or what is sent to wake might go to whoever has that descriptor next
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._received = memoryview(bytearray(_READ_BYTES))  # one for all: a new one for each read is slow to get
        self._all: dict[socket.socket, Peer] = {}
        self._is_fork = False
        _close_in_forks(self)

    def wake(self) -> None:
        """End the turn, or the next one; from any thread."""
        with self._waking, contextlib.suppress(OSError):  # it is about to end, or they are closed
            self._wake.send(b"\0")

    def turn(self, timeout: float | None) -> list[tuple[Peer, list[bytes] | None]] | None:
        """Wait until somebody has something to say, or for :meth:`wake`.

        Args:
            timeout: seconds; None for no limit.

        Returns:
            of each that was heard, the messages that are whole by now, maybe none; None of those that have gone, which
            are to be dropped. None if nothing has happened at all, but for a :meth:`wake`.
        """
        heard: list[tuple[Peer, list[bytes] | None]] = []
        something = False
        for key, mask in self._selector.select(timeout):
            if key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                continue
            if key.fileobj is self._listener:
                something |= self._accept()
                continue
            something = True
            peer: Peer = key.data
            if mask & selectors.EVENT_WRITE:
                self._write(peer)
            if not mask & selectors.EVENT_READ:
                continue
            try:
                messages = peer.read(self._received)
                if peer.number is not None:
                    heard.append((peer, messages))
            except OSError:  # it has gone
                self._forget(peer)
                if peer.number is None:
                    peer.sock.close()
                else:
                    heard.append((peer, None))
        return heard if something else None

    def send(self, peer: Peer, data: bytes) -> None:
        """Send it, now or in a later turn; never, if the peer has gone."""
        if peer.sock in self._all:
            peer.outgoing += data
            self._write(peer)

    def drop(self, peer: Peer) -> None:
        """Close the connection to a peer, if it is open."""
        if peer.sock in self._all:
            self._forget(peer)
        peer.sock.close()

    def close(self) -> None:
        for peer in list(self._all.values()):
            self.drop(peer)
        self._selector.close()
        self._listener.close()
        with self._waking:
            self._woken.close()
            self._wake.close()
        if not self._is_fork:
            remove_address(self.address)

    def leave_to_parent(self) -> None:
        """Close what a fork of this process has got of it, and touch nothing that is its parent's.

        A worker may be such a fork: if it held the connections of others open, they would not see their end when the
        parent is killed.
        """
        self._is_fork = True
        for sock in (self._listener, self._woken, self._wake, *self._all):
            sock.close()
        self._all.clear()
        self._selector.close()

    def _forget(self, peer: Peer) -> None:
        del self._all[peer.sock]
        self._selector.unregister(peer.sock)

    def _accept(self) -> bool:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are no descriptors left
            time.sleep(_PAUSE)
            return False
        sock.setblocking(False)
        peer = self._all[sock] = Peer(sock)
        self._selector.register(sock, selectors.EVENT_READ, peer)
        return True

    def _write(self, peer: Peer) -> None:
        try:
            while peer.outgoing:
                del peer.outgoing[: peer.sock.send(peer.outgoing)]
        except BlockingIOError:
            pass
        except OSError:  # it has gone; what it said last may still be to be read
            peer.outgoing.clear()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outgoing else 0)
        if self._selector.get_key(peer.sock).events != events:
            self._selector.modify(peer.sock, events, peer)


class Peer:
    """A process that has connected.

    Attributes:
        sock: the connection.
        number: as it says; None until it has.
        outgoing: what it has yet to be sent.
    """

    __slots__ = ("_incoming", "number", "outgoing", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.number: int | None = None
        self.outgoing = bytearray()
        self._incoming = bytearray()

    def read(self, buffer: memoryview) -> list[bytes]:
        """The messages that are whole.

        Raises:
            OSError: there will be no more.
        """
        try:
            n = self.sock.recv_into(buffer)
        except BlockingIOError:
            return []
        if not n:
            raise ConnectionResetError
        incoming = self._incoming
        incoming += buffer[:n]
        if self.number is None:
            if len(incoming) < _NUMBER.size:
                return []
            (self.number,) = _NUMBER.unpack_from(incoming)
            del incoming[: _NUMBER.size]
        messages: list[bytes] = []
        at = 0
        while len(incoming) >= at + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(incoming, at)
            start = at + _LENGTH.size
            if len(incoming) < start + length:
                break
            messages.append(bytes(incoming[start : start + length]))
            at = start + length
        if at:
            del incoming[:at]
        return messages


_open: weakref.WeakSet[Peers] | None = None


def _close_in_forks(peers: Peers) -> None:
    global _open
    if _open is None:
        _open = weakref.WeakSet()
        os.register_at_fork(after_in_child=_leave_all_to_parent)
    _open.add(peers)


def _leave_all_to_parent() -> None:
    for peers in list(_open or ()):
        peers.leave_to_parent()
