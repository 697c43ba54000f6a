"""JobLog: what a job printed, as much of it as is kept."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

__all__ = ["JobLog"]


@dataclass(frozen=True, slots=True)
class JobLog:
    """What a job printed: its beginning and its end, and how much between them was not kept.

    Attributes:
        head: the first bytes.
        dropped: how many bytes came between head and tail.
        tail: the last bytes; empty if head is all.
    """

    head: bytes
    dropped: int = 0
    tail: bytes = b""

    @property
    def size(self) -> int:
        """How many bytes were printed."""
        return len(self.head) + self.dropped + len(self.tail)

    def __str__(self) -> str:
        """As text; what is not UTF-8 is shown in escapes such as ``\\xff``."""
        if not self.dropped:
            return (self.head + self.tail).decode("utf-8", "backslashreplace")
        # A character that was cut in two is left out.
        head = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode(self.head)
        tail = self.tail[next((i for i, byte in enumerate(self.tail[:4]) if byte & 0xC0 != 0x80), 0) :]
        return f"{head}{_gap(self.dropped)}{tail.decode('utf-8', 'backslashreplace')}"

    def since(self, position: int) -> bytes:
        """What came after the first ``position`` bytes; where some of it was not kept, it says so."""
        if position <= len(self.head):
            gap = _gap(self.dropped).encode() if self.dropped else b""
            return self.head[position:] + gap + self.tail
        missing = len(self.head) + self.dropped - position
        if missing > 0:
            return _gap(missing).encode() + self.tail
        return self.tail[-missing:]


def _gap(dropped: int) -> str:
    return f"\n[... {dropped:,} bytes were not kept ...]\n"
