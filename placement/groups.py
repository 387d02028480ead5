"""Placement groups: what the cluster has free, reserving a plan, releasing it."""

import asyncio
import time
from collections.abc import Collection
from typing import Any, NamedTuple

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from placement.planner import Infeasible, Node, Placed

ON_HEAD = {"node:__internal_head__": 0.001}
"""Resources for what would end with Ray's head in any case: so no other node takes it along. Without demands Ray would put it anywhere."""
NODE_ID_LABEL = "ray.io/node-id"
POLL_S = 0.05


class Reservation(NamedTuple):
    """A placement group that holds its resources."""

    placed: Placed
    group: PlacementGroup

    @property
    def id(self) -> str:
        return str(self.group.id.hex())


def inventory() -> list[Node]:
    """The live nodes and what each has free."""
    available = ray._private.state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        free = available.get(node["NodeID"], {})
        labels = frozenset((str(k), str(v)) for k, v in (node.get("Labels") or {}).items())
        nodes.append(Node(node["NodeID"], float(free.get("CPU", 0.0)), float(free.get("GPU", 0.0)), labels))
    return nodes


async def reserve(plan: list[Placed], name: str, timeout_s: float) -> list[Reservation]:
    """One placement group each, all of them ready; on any failure none is left and Infeasible says which was missing."""
    held = [Reservation(placed, _create(placed, f"{name}-{placed.group.role}-{i}")) for i, placed in enumerate(plan)]
    deadline_s = time.monotonic() + timeout_s
    try:
        for reservation in held:
            await _ready(reservation, deadline_s, timeout_s)
    except BaseException:
        release(held)
        raise
    return held


def release(reservations: list[Reservation]) -> None:
    """Give the resources back; what ran in the groups is killed by Ray."""
    for reservation in reservations:
        remove_placement_group(reservation.group)


def release_named(prefix: str, keep: Collection[str]) -> None:
    """Remove all groups whose names begin so, but those with the ids in `keep`; for what nobody holds a reservation of any more."""
    for group_id, table in placement_group_table().items():
        if table["name"].startswith(prefix) and table["state"] != "REMOVED" and group_id not in keep:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))))


def describe(reservation: Reservation) -> dict[str, Any]:
    """As `status` shows it."""
    table = placement_group_table(reservation.group)
    return {
        "id": reservation.id,
        "role": reservation.placed.group.role,
        "strategy": table.get("strategy", _strategy(reservation.placed)),
        "state": table.get("state", "UNKNOWN"),
        "nodes": sorted(set(table.get("bundles_to_node_id", {}).values())),
    }


def _strategy(placed: Placed) -> str:
    """The ranks of an FFN instance reduce among themselves: one node holds them all."""
    return placed.group.strategy if placed.group.actors == 1 else "STRICT_PACK"


def _create(placed: Placed, name: str) -> PlacementGroup:
    group = placed.group
    # Ray refuses a bundle of nothing.
    bundle = {"CPU": max(group.num_cpus, 0.001)} | ({"GPU": group.num_gpus} if group.num_gpus else {})
    selector = {NODE_ID_LABEL: placed.node_id}
    made: PlacementGroup = placement_group(
        [bundle] * group.actors, strategy=_strategy(placed), name=name, bundle_label_selector=[selector] * group.actors
    )
    return made


async def _ready(reservation: Reservation, deadline_s: float, timeout_s: float) -> None:
    while True:
        table = placement_group_table(reservation.group)
        if table.get("state") == "CREATED":
            return
        role, node = reservation.placed.group.role, reservation.placed.node_id
        if (table.get("stats") or {}).get("scheduling_state") == "INFEASIBLE":
            raise Infeasible(f"a placement group for {role} on node {node} can never be met: {_bundle(reservation)}")
        if time.monotonic() > deadline_s:
            raise Infeasible(
                f"a placement group for {role} on node {node} was not ready in {timeout_s:g} s: {_bundle(reservation)}"
            )
        await asyncio.sleep(POLL_S)


def _bundle(reservation: Reservation) -> str:
    group = reservation.placed.group
    return f"{group.actors} actor(s) of {group.num_cpus:g} CPUs and {group.num_gpus:g} GPUs"
