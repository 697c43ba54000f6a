"""What fits on the nodes of the Ray that this program is connected to."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from evalkit.errors import BackendError

__all__ = ["check_demand"]


def check_demand(demand: Mapping[str, float]) -> int:
    """How many tasks that take this much each have room at once.

    Raises:
        BackendError: not even one has, on any node.
    """
    wanted = {name: amount for name, amount in demand.items() if amount}
    found = ray.nodes()  # type: ignore[no-untyped-call]
    nodes: list[Mapping[str, float]] = [node["Resources"] for node in found if node["Alive"]]
    room = 0
    for node in nodes:
        fits = [int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()]
        room += min(fits, default=2**31)
    if room:
        return room
    lacking = {name: amount for name, amount in wanted.items() if all(node.get(name, 0.0) < amount for node in nodes)}
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
    raise BackendError(
        f"no node of Ray has what one job takes, {_said(wanted)}: the most that one of {len(nodes)} nodes has is "
        f"{_said({name: most[name] for name in lacking or most})}; ask for less per task, or give the cluster more"
    )


def _said(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {amount:g}" for name, amount in amounts.items())
