"""Where jobs run: the contract, and the doors for authors of backends."""

from evalkit.backends.base import Backend, BackendSpec, Capabilities, Emit, RunFunction, Task
from evalkit.backends.events import (
    Cancelled,
    Done,
    Event,
    Failed,
    Lost,
    Progress,
    Recorded,
    Started,
    WorkerIdentity,
)

__all__ = [
    "Backend",
    "BackendSpec",
    "Cancelled",
    "Capabilities",
    "Done",
    "Emit",
    "Event",
    "Failed",
    "Lost",
    "Progress",
    "Recorded",
    "RunFunction",
    "Started",
    "Task",
    "WorkerIdentity",
]
