"""The ray backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evalkit import ErrorInfo, JobCause
from evalkit.backends import Capabilities, Emit, ExecutorBackend, Fault, Reach, RunFunction, SideChannel
from evalkit_ray.channel import RayChannel
from evalkit_ray.executor import GONE, RayExecutor
from evalkit_ray.nodes import check_demand
from evalkit_ray.session import Session, SessionSettings, join

__all__ = ["RayBackend"]

_log = logging.getLogger("evalkit")

#: Ends of a task that are no job's fault.
_LOSSES = (NodeDiedError, ObjectLostError, LocalRayletDiedError, RaySystemError, TaskCancelledError)
_OWN_OPTIONS = ("address", "num_cpus", "num_gpus", "runtime_env")


class RayBackend(ExecutorBackend):
    """Jobs as tasks of Ray, on a cluster or on this machine.

    It uses the Ray that this program is already connected to; else the one at ``address``, or in ``RAY_ADDRESS``; else
    it starts one on this machine, which ends with it. It never attaches itself to a cluster that it merely found, and
    never ends one that it did not start.

    Args:
        num_workers: how many jobs run at once, as far as the cluster has room.
        address: of a cluster, such as ``"10.0.0.5:6379"``; ``"auto"`` for the one on this machine, ``"local"`` for a
            new one, whatever ``RAY_ADDRESS`` says.
        num_cpus: CPUs of a Ray that is started here. By default as many as this machine has, and no fewer than all
            workers take, so that ``num_workers`` jobs do run at once.
        num_gpus: GPUs of a Ray that is started here; by default those that are found.
        num_cpus_per_task: CPUs that a running job takes.
        num_gpus_per_task: GPUs that a running job takes; Ray sets ``CUDA_VISIBLE_DEVICES`` accordingly.
        resources_per_task: other resources that a running job takes, such as ``{"licence": 1}``.
        runtime_env: Ray's description of what the workers need: packages, files, variables.
        ray_kwargs: further keyword arguments of ``ray.init``, for a connection that is made here.
        worker_init: called once in each worker process before its first job; what it returns is ``job.worker_state``.
        batching: whether cheap jobs may travel together in a task.
        hold: seconds that a result may be held back by others of its task.

    Raises:
        ValueError, TypeError: an option makes no sense.
    """

    capabilities = Capabilities(
        kills_running=True, isolates_crashes=True, by_value=True, streams=True, spans_nodes=True
    )

    def __init__(
        self,
        num_workers: int,
        *,
        address: str | None = None,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        num_cpus_per_task: float = 1,
        num_gpus_per_task: float = 0,
        resources_per_task: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        ray_kwargs: Mapping[str, Any] | None = None,
        worker_init: Callable[[], Any] | None = None,
        batching: bool = True,
        hold: float = 0.010,
    ) -> None:
        super().__init__(num_workers, worker_init=worker_init, batching=batching, hold=hold)
        if address is not None and not isinstance(address, str):
            raise TypeError(f"address takes a text such as '10.0.0.5:6379', not {address!r}")
        numbers = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "num_cpus_per_task": num_cpus_per_task,
            "num_gpus_per_task": num_gpus_per_task,
        }
        for name, value in numbers.items():
            if value is not None:
                _check_amount(name, value)
        mappings = {"resources_per_task": resources_per_task, "runtime_env": runtime_env, "ray_kwargs": ray_kwargs}
        for name, mapping in mappings.items():
            if mapping is not None and not isinstance(mapping, Mapping):
                raise TypeError(f"{name} takes a mapping, not {mapping!r}")
        for name in (resources_per_task or {}).keys() & {"CPU", "GPU"}:
            raise ValueError(f"resources_per_task has {name!r}: that is num_{name.lower()}s_per_task")
        for name, value in (resources_per_task or {}).items():
            _check_amount(f"resources_per_task[{name!r}]", value)
        for name in _OWN_OPTIONS:
            if name in (ray_kwargs or {}):
                raise ValueError(f"ray_kwargs has {name!r}, which is an option of its own: give it as {name}=...")
        self._settings = SessionSettings(
            address, num_cpus, num_gpus, runtime_env, dict(ray_kwargs or {}), num_workers * num_cpus_per_task
        )
        self._demand = {"CPU": num_cpus_per_task, "GPU": num_gpus_per_task, **(resources_per_task or {})}
        self._resources = dict(resources_per_task or {})
        self._session: Session | None = None

    def start(self, run_function: RunFunction, emit: Emit) -> None:
        self._session = join(self._settings)
        try:
            room = check_demand(self._demand)
            if room < self.num_workers:
                _log.warning("Ray has room for %d of %d workers now; other jobs wait in it", room, self.num_workers)
            super().start(run_function, emit)
        except BaseException:
            self._session.leave()
            raise

    def stop(self, grace: float) -> None:
        super().stop(grace)
        if self._session is not None:
            self._session.leave()

    # -- what ExecutorBackend asks --------------------------------------------------------------------------------

    def make_executor(self) -> Executor:
        options = {
            "num_cpus": self._demand["CPU"],
            "num_gpus": self._demand["GPU"],
            "resources": self._resources or None,
            **self._environment(),
        }
        return RayExecutor(options, None if self._session is None else self._session.folder)

    def make_channel(self) -> SideChannel:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return RayChannel({"num_cpus": 0, "scheduling_strategy": here, **self._environment()})

    def _environment(self) -> dict[str, Any]:
        environment = None if self._session is None else self._session.runtime_env
        return {} if environment is None else {"runtime_env": dict(environment)}

    @staticmethod
    def worker_name() -> str:
        return f"ray-{os.getpid()}"

    def blame(self, exc: BaseException) -> Fault:
        kind = type(exc).__name__
        if not ray.is_initialized():  # whatever it says
            return Fault(Reach.CALL, JobCause.LOST, ErrorInfo("RuntimeError", GONE))
        if isinstance(exc, WorkerCrashedError):
            error = ErrorInfo("WorkerDied", "the worker process of Ray that it ran in died")
            return Fault(Reach.CALL, JobCause.CRASH, error)
        if isinstance(exc, OutOfMemoryError):
            return Fault(Reach.CALL, JobCause.MEMORY, ErrorInfo("OutOfMemory", str(exc)))
        if isinstance(exc, _LOSSES):
            return Fault(Reach.CALL, JobCause.LOST, ErrorInfo(kind, str(exc)))
        if isinstance(exc, RayTaskError):
            needed = "evalkit-core and evalkit-ray as they are here: install them on each node"
            message = f"{exc}\nRay's workers need {needed}"
            return Fault(Reach.CALL, JobCause.EXCEPTION, ErrorInfo(kind, message))
        return super().blame(exc)

    def kill(self, future: Future[Any]) -> bool:
        executor = self.executor
        return isinstance(executor, RayExecutor) and executor.kill(future)

    def shut_executor(self, executor: Executor, grace: float) -> None:
        if isinstance(executor, RayExecutor):
            executor.end(grace, kill=True)


def _check_amount(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} takes a number, not {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} takes a number from 0 on, not {value!r}")
