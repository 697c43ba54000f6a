"""DoneBatch: the ends of many short jobs, in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from evalkit.backends.base import Task
from evalkit.backends.events import Done, WorkerIdentity
from evalkit.metadata import MeasuredRuns

__all__ = ["DoneBatch"]


class DoneBatch(Sequence[Done]):
    """Many ``Done`` of one worker, by columns: who knows that needs no object for each, which is a tenth of what a job
    costs that does nothing. To anybody else it is a sequence of events.

    Args:
        tasks: as they were dispatched.
        outputs, measured: of these, in their order.
    """

    __slots__ = ("measured", "outputs", "tasks", "worker")

    def __init__(
        self, tasks: Sequence[Task], outputs: Sequence[Any], measured: MeasuredRuns, worker: WorkerIdentity | None
    ) -> None:
        self.tasks = tasks
        self.outputs = outputs
        self.measured = measured
        self.worker = worker

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Done: ...

    @overload
    def __getitem__(self, index: slice) -> list[Done]: ...

    def __getitem__(self, index: int | slice) -> Done | list[Done]:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        return Done(self.tasks[index].id, self.outputs[index], self.measured.of(index), self.worker)
