"""The actors of a cluster by id: started in placement groups, called, ended for good, and found again after the controller's death."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.attention import AttentionActor
from actors.ffn import FFNActor
from actors.roster import Hand, awaited, first_line, gather_named
from afd_ray.config import Config
from placement.demand import attention_group, ffn_group, separate_nodes
from placement.groups import Reservation, release, release_named, reserve
from placement.planner import Group, Placed, Role, plan
from placement.room import find_room

logger = logging.getLogger(__name__)

POLL_S = 0.02
KILL_AFTER_S = 0.3
"""A released actor of this host that has not ended by then is killed by its process id."""
GRACE_S = 0.5
"""From when Ray calls an actor of another host dead until its process is taken to have ended: its raylet kills what does not end by itself."""
GONE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Held:
    """A placement group, and which actor has each of its bundles (None: free)."""

    reservation: Reservation
    bundles: list[str | None]


@dataclass(frozen=True, slots=True)
class Found:
    """What a restarted controller needs to know of an actor."""

    name: str
    role: Role
    bundle: int
    identity: dict[str, Any]


@dataclass(slots=True)
class Crew:
    """Every actor that was started and has not been released, and what is reserved for them."""

    config: Config
    secret: bytes
    uid: str
    """Names actors and placement groups in Ray."""
    namespace: str
    controller: str
    """Name of the controller's actor: without one, actors end by themselves."""
    hands: dict[str, Hand] = field(default_factory=dict)
    lack: str | None = None
    """What is missing, while it waits for nodes."""
    _held: list[Held] = field(default_factory=list)

    def __getitem__(self, member: str) -> Hand:
        return self.hands[member]

    def __contains__(self, member: object) -> bool:
        return member in self.hands

    async def provide(self, number: int, attention: Sequence[str], ffn: Sequence[Sequence[str]]) -> None:
        """Start these, an FFN instance's together, and wait until their processes answer.

        Raises Infeasible when there is no room, RuntimeError naming an actor that died; what is there by then is for `release`.
        """
        wanted: list[tuple[Group, Sequence[str]]] = [(attention_group(self.config), [name]) for name in attention]
        wanted += [(ffn_group(self.config, len(names)), names) for names in ffn]
        started: list[str] = []
        for group, names in list(wanted):
            held = self._room(group)
            if held is not None:
                wanted.remove((group, names))
                started += self._launch(held, names)
        if wanted:
            placed = await self._find_room([group for group, _ in wanted])
            reserved = await reserve(placed, self._ray_name(f"e{number}"), self.config.placement.timeout_s)
            for reservation, (group, names) in zip(reserved, wanted, strict=True):
                self._held.append(Held(reservation, [None] * group.actors))
                started += self._launch(self._held[-1], names)
        await gather_named({name: self.hands[name].handle.beat.remote() for name in started}, "start")

    def release(self, members: Iterable[str]) -> list[Hand]:
        """End these however they are, and give back the placement groups that nobody is left in; gives who was there."""
        ended = [self.hands.pop(member) for member in members if member in self.hands]
        for hand in ended:
            ray.kill(hand.handle)
        for held in list(self._held):
            held.bundles = [member if member in self.hands else None for member in held.bundles]
            if not any(held.bundles):
                self._held.remove(held)
                release([held.reservation])
        return ended

    async def gone(self, hand: Hand) -> None:
        """Return once its process has ended, or must have; one on this host is helped along."""
        pid, waited_s = hand.identity.get("pid"), 0.0
        here = hand.identity.get("node") == ray.get_runtime_context().get_node_id()
        if pid is None or not here:
            await _dead(hand)
            await asyncio.sleep(GRACE_S if pid is not None else 0.0)
            return
        while _alive(pid) and waited_s < GONE_TIMEOUT_S:
            if waited_s > KILL_AFTER_S:
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(POLL_S)
            waited_s += POLL_S

    def spin_hosts(self, members: Sequence[str]) -> int:
        """How many of these share a host at most."""
        nodes = [self.hands[member].reservation.placed.node_id for member in members]
        return max((nodes.count(node) for node in nodes), default=0)

    # --- across the controller's death --------------------------------------------------------------------------------------

    def describe(self) -> list[tuple[Reservation, list[Found | None]]]:
        """What `adopt` needs."""
        return [
            (held.reservation, [self._found(member, bundle) for bundle, member in enumerate(held.bundles)]) for held in self._held
        ]

    def adopt(self, described: list[tuple[Reservation, list[Found | None]]]) -> list[str]:
        """Take these over; gives the names of those that Ray does not know any more.

        Whatever else bears this cluster's name is ended: a controller that died had begun to start it, and could not tell.
        """
        self._held, self.hands, missing = [], {}, []
        for reservation, found in described:
            self._held.append(Held(reservation, [one.name if one else None for one in found]))
            for one in filter(None, found):
                try:
                    handle = ray.get_actor(self._ray_name(one.name), namespace=self.namespace)
                except ValueError:
                    missing.append(one.name)
                    continue
                self.hands[one.name] = Hand(one.name, one.role, handle, reservation, one.bundle, one.identity)
        self._end_unknown()
        return missing

    def _end_unknown(self) -> None:
        known = {self._ray_name(member) for member in self.hands}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name = actor["name"]
            if actor["namespace"] == self.namespace and name.startswith(self._ray_name("")) and name not in known:
                logger.warning("%s was started and never taken into the cluster: it is ended", name)
                with suppress(ValueError):  # it has ended meanwhile
                    ray.kill(ray.get_actor(name, namespace=self.namespace))
        release_named(self._ray_name("e"), keep={held.reservation.id for held in self._held})

    def _found(self, member: str | None, bundle: int) -> Found | None:
        hand = self.hands.get(member) if member else None
        return Found(hand.name, hand.role, bundle, hand.identity) if hand else None

    async def _find_room(self, groups: list[Group]) -> list[Placed]:
        asked = self.config.placement
        place = partial(
            plan,
            groups,
            separate_nodes=separate_nodes(self.config),
            topology=asked.topology_label,
            beside={held.reservation.placed.node_id for held in self._held},
        )
        try:
            return await find_room(groups, place, asked.wait_for_nodes_s, on_lack=self._note_lack)
        finally:
            self.lack = None

    def _note_lack(self, lack: str) -> None:
        logger.warning("waiting for nodes: %s", lack)
        self.lack = lack

    # --- one actor ------------------------------------------------------------------------------------------------------------

    def _room(self, group: Group) -> Held | None:
        """A placement group of this role with enough bundles free."""
        for held in self._held:
            if held.reservation.placed.group.role == group.role and held.bundles.count(None) >= group.actors:
                return held
        return None

    def _launch(self, held: Held, names: Sequence[str]) -> list[str]:
        for name in names:
            bundle = held.bundles.index(None)
            held.bundles[bundle] = name
            self.hands[name] = self._start(held.reservation, bundle, name)
        return list(names)

    def _start(self, reservation: Reservation, bundle: int, name: str) -> Hand:
        group = reservation.placed.group
        cls = AttentionActor if group.role == "attention" else FFNActor
        # Detached: they outlive the controller, whose successor finds them by name.
        options = {"name": self._ray_name(name), "namespace": self.namespace, "lifetime": "detached"}
        strategy = PlacementGroupSchedulingStrategy(reservation.group, placement_group_bundle_index=bundle)
        handle = (
            ray.remote(cls)
            .options(
                **options,
                num_cpus=group.num_cpus,
                num_gpus=group.num_gpus,
                max_concurrency=1000,
                scheduling_strategy=strategy,
            )
            .remote(name, self.config, self.secret, self.controller)
        )
        return Hand(name, group.role, handle, reservation, bundle)

    def _ray_name(self, what: str) -> str:
        """Of a member, or of the placement groups of an epoch."""
        return f"afd-{self.uid}-{what}"


async def _dead(hand: Hand) -> None:
    """Until Ray calls it dead."""
    try:
        while True:
            await asyncio.wait_for(awaited(hand.handle.beat.remote()), GONE_TIMEOUT_S)
            await asyncio.sleep(POLL_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        logger.debug("%s has ended: %s", hand.name, first_line(error))


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
