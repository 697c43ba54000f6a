"""Where jobs run: the contract, and the doors for authors of backends."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from evalkit.backends.base import Backend, BackendSpec, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import (
    Cancelled,
    Done,
    DonePickled,
    Ended,
    Event,
    Failed,
    Lost,
    Pickled,
    Printed,
    Progress,
    Recorded,
    RecordedPickled,
    Released,
    Rerun,
    Started,
    WorkerIdentity,
)

if TYPE_CHECKING:
    from evalkit.backends.asynchronous import AsyncBackend, RunFailedError, RunLostError
    from evalkit.backends.calls import pack_call, read_answer, run_call
    from evalkit.backends.chunk import Program
    from evalkit.backends.execution import environment
    from evalkit.backends.executor import ExecutorBackend
    from evalkit.backends.executor_call import Fault, Reach
    from evalkit.backends.lead import Lead
    from evalkit.backends.peers import Peer, PeerAddress, Peers, connect_peer, frame
    from evalkit.backends.serialization import pack_exception, unpack_exception
    from evalkit.backends.side_channel import Receive, SideChannel, SideChannelClient

__all__ = [
    "AsyncBackend",
    "Backend",
    "BackendSpec",
    "Cancelled",
    "Capabilities",
    "Done",
    "DonePickled",
    "Emit",
    "Ended",
    "Event",
    "ExecutorBackend",
    "Failed",
    "Fault",
    "Lead",
    "Lost",
    "Peer",
    "PeerAddress",
    "Peers",
    "Pickled",
    "Printed",
    "Program",
    "Progress",
    "Reach",
    "Receive",
    "Recorded",
    "RecordedPickled",
    "Released",
    "Rerun",
    "RunFailedError",
    "RunFunction",
    "RunLostError",
    "SideChannel",
    "SideChannelClient",
    "Started",
    "Task",
    "WorkerIdentity",
    "connect_peer",
    "environment",
    "frame",
    "pack_call",
    "pack_exception",
    "read_answer",
    "run_call",
    "unpack_exception",
]

_MODULES = {
    "AsyncBackend": "asynchronous",
    "ExecutorBackend": "executor",
    "Fault": "executor_call",
    "Lead": "lead",
    "Peer": "peers",
    "PeerAddress": "peers",
    "Peers": "peers",
    "Program": "chunk",
    "Reach": "executor_call",
    "Receive": "side_channel",
    "RunFailedError": "asynchronous",
    "RunLostError": "asynchronous",
    "SideChannel": "side_channel",
    "SideChannelClient": "side_channel",
    "connect_peer": "peers",
    "environment": "execution",
    "frame": "peers",
    "pack_call": "calls",
    "pack_exception": "serialization",
    "read_answer": "calls",
    "run_call": "calls",
    "unpack_exception": "serialization",
}


def __getattr__(name: str) -> Any:
    # asyncio and concurrent.futures are imported when they are wanted.
    if name in _MODULES:
        return getattr(importlib.import_module(f"evalkit.backends.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
