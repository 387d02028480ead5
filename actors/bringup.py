"""Forming an epoch: reserve placement groups, start or reuse actors, load weights, connect every edge, start the loops."""

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.attention import AttentionActor
from actors.ffn import FFNActor
from actors.roster import Hand, ask, gather_named
from afd_ray.config import Config
from afd_ray.membership.contract import check_same_model
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.models.config import ModelConfig
from placement.groups import Reservation, inventory, release, reserve
from placement.planner import Group, Placed, plan

logger = logging.getLogger(__name__)

LOADING = "loading"
SPIN_US = 200.0
"""How long an actor spins for the next message before it parks, where the host has a core for each actor."""
LOAD_TIMEOUT_S = 3600.0
"""For an actor to start and read its tensors: hundreds of gigabytes from a network disk at worst."""
MOST_MICRO_BATCHES = 4
"""Slots of an attention rank that decides itself how many it uses."""

COLOCATED_MICRO_BATCHES = 1
"""Nothing is on a wire meanwhile, and every micro-batch reads all weights."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many ranks an epoch has, `expert_parallel` 0 when colocated; `micro_batches` None: each attention rank decides, from its stage times."""

    attention: int
    tensor_parallel: int
    expert_parallel: int
    micro_batches: int | None

    @classmethod
    def of(cls, config: Config) -> "Shape":
        micro_batches = config.pipeline.micro_batches
        ffn = config.ffn
        count = None if micro_batches == "auto" else micro_batches
        return cls(config.attention.replicas, ffn.tensor_parallel, ffn.ranks // ffn.tensor_parallel, count)

    def epoch(self, number: int) -> Epoch:
        colocated = self.expert_parallel == 0
        slots = self.micro_batches or (COLOCATED_MICRO_BATCHES if colocated else MOST_MICRO_BATCHES)
        adaptive = self.micro_batches is None and not colocated
        return Epoch(number, self.attention, self.tensor_parallel, self.expert_parallel, slots, adaptive)


def epoch_for(config: Config, model: ModelConfig, shape: Shape, number: int, loads: Sequence[int] = ()) -> Epoch:
    """An epoch of this shape as configured; `loads`: how often each expert was chosen, empty where that is not known."""
    ffn = config.ffn
    return shape.epoch(number).with_experts(model, ffn.dispatch, ffn.redundant_experts, loads)


@dataclass(slots=True)
class Bringup:
    """The actors and placement groups of a cluster, and how they get from one epoch to the next."""

    config: Config
    checkpoint: Checkpoint
    secret: bytes
    attention: list[Hand] = field(default_factory=list)
    ffn: list[Hand] = field(default_factory=list)
    epoch: Epoch | None = None
    shape: Shape | None = None
    """Asked for, of the last epoch."""
    doing: str = ""
    _uid: str = field(default_factory=lambda: secrets.token_hex(4))
    _started: int = 0
    _number: int = 0

    @property
    def hands(self) -> list[Hand]:
        """In the order of the group ranks."""
        return [*self.attention, *self.ffn]

    @property
    def epoch_number(self) -> int:
        return self.epoch.number if self.epoch else 0

    async def form(self, shape: Shape, loads: Sequence[int] = ()) -> None:
        """Get to an epoch of this shape, with experts placed by these loads; on an error the caller dissolves what there is."""
        self._number += 1
        epoch = epoch_for(self.config, self.checkpoint.config, shape, self._number, loads)
        epoch.check(self.checkpoint.config)
        await self._drop_dead()
        await self._provide(shape)
        await self._load(epoch)
        await self._connect(epoch)
        self._doing("starting the step loops")
        for method in ("switch", "retire"):
            await ask(self.hands, method, epoch.number, timeout_s=self.config.handoff.start_timeout_s)
        for hand in self.hands:
            hand.state = "running"
        self.epoch, self.shape = epoch, shape
        self._doing("ready")

    async def progress(self) -> str:
        """What is being done, with how far the loading has come to a tenth."""
        if not self.doing.startswith(LOADING):
            return self.doing
        try:
            shares = await ask(self.hands, "loaded", timeout_s=0.5)
        except (RuntimeError, TimeoutError):
            return self.doing  # actors that are still starting do not answer yet
        return f"{self.doing}: {int(10 * sum(shares) / len(shares)) * 10}%"

    async def dissolve(self) -> None:
        """Stop everything and give the resources back."""
        await self._stop(self.hands)
        self.attention, self.ffn, self.epoch = [], [], None

    # --- steps of form ----------------------------------------------------------------------------------------------------

    async def _drop_dead(self) -> None:
        self.epoch = None
        dead = [hand for hand in self.hands if hand.state == "dead"]
        await self._stop(dead)
        self.attention = [hand for hand in self.attention if hand not in dead]
        self.ffn = [hand for hand in self.ffn if hand not in dead]

    async def _provide(self, shape: Shape) -> None:
        """Keep the actors that fit the shape, stop the surplus, start the missing."""
        surplus = self.attention[shape.attention :]
        ranks = shape.tensor_parallel * shape.expert_parallel
        if self.ffn and len(self.ffn) != ranks:
            surplus, self.ffn = surplus + self.ffn, []
        self.attention = self.attention[: shape.attention]
        await self._stop(surplus)
        groups = [self._attention_group()] * (shape.attention - len(self.attention))
        if not self.ffn:
            groups += [self._ffn_group(shape.tensor_parallel)] * shape.expert_parallel
        if groups:
            await self._start(groups)

    async def _start(self, groups: list[Group]) -> None:
        placing = f"placing {sum(group.actors for group in groups)} actors in {len(groups)} placement groups"
        self._doing(placing)
        config = self.config.placement
        placed: list[Placed] = plan(
            groups, await asyncio.to_thread(inventory), not self.config.ffn.colocated and config.separate_nodes
        )
        for reservation in await reserve(placed, f"afd-{self._uid}-e{self._number}", config.timeout_s):
            group = reservation.placed.group
            for bundle in range(group.actors):
                hand = self._launch(reservation, bundle)
                (self.attention if group.role == "attention" else self.ffn).append(hand)

    def _launch(self, reservation: Reservation, bundle: int) -> Hand:
        group = reservation.placed.group
        name = f"{group.role}-{self._started}"
        self._started += 1
        cls = AttentionActor if group.role == "attention" else FFNActor
        handle = (
            ray.remote(cls)
            .options(
                name=f"afd-{self._uid}-{name}",
                num_cpus=group.num_cpus,
                num_gpus=group.num_gpus,
                max_concurrency=1000,
                scheduling_strategy=PlacementGroupSchedulingStrategy(reservation.group, placement_group_bundle_index=bundle),
            )
            .remote(name, self.config, self.secret)
        )
        return Hand(name, group.role, handle, reservation, bundle)

    async def _load(self, epoch: Epoch) -> None:
        self._doing(f"{LOADING} {self.config.model.served_name} into {len(self.hands)} actors")
        calls = {hand.name: hand.handle.load.remote() for hand in self.attention}
        for rank, hand in zip(epoch.ffn_ranks, self.ffn, strict=True):
            calls[hand.name] = hand.handle.load.remote(epoch.shard(rank, self.checkpoint.config))
        for hand, identity in zip(self.hands, await gather_named(calls, "load", LOAD_TIMEOUT_S), strict=True):
            hand.identity = identity
        check_same_model({hand.name: hand.identity["model_digest"] for hand in self.hands})

    async def _connect(self, epoch: Epoch) -> None:
        self._doing(f"connecting {epoch.attention} attention and {epoch.ffn} FFN ranks")
        timeout_s = self.config.handoff.start_timeout_s
        name = f"afd-{self._uid}-e{epoch.number}"
        spin_us = self._spin_us()
        calls = {hand.name: hand.handle.prepare.remote(epoch, rank, name, spin_us) for rank, hand in enumerate(self.hands)}
        endpoints: dict[int, dict[str, Any]] = dict(enumerate(await gather_named(calls, "prepare", timeout_s)))
        await ask(self.hands, "connect", epoch.number, endpoints, timeout_s, timeout_s=timeout_s + 5)

    async def _stop(self, hands: list[Hand]) -> None:
        for hand in hands:
            ray.kill(hand.handle)
        release(list({hand.reservation.id: hand.reservation for hand in hands}.values()))

    # --- what a group asks for --------------------------------------------------------------------------------------------

    def _attention_group(self) -> Group:
        attention = self.config.attention
        labels = frozenset(attention.labels.items())
        return Group("attention", 1, attention.num_cpus, attention.num_gpus, labels, self.config.placement.attention)

    def _ffn_group(self, actors: int) -> Group:
        ffn = self.config.ffn
        return Group("ffn", actors, ffn.num_cpus, ffn.num_gpus, frozenset(ffn.labels.items()), self.config.placement.ffn)

    def _spin_us(self) -> float:
        """Spinning pays only where every actor of a host has a core of its own."""
        on_node: dict[str, int] = {}
        for hand in self.hands:
            node = hand.reservation.placed.node_id
            on_node[node] = on_node.get(node, 0) + 1
        return SPIN_US if max(on_node.values()) <= (os.cpu_count() or 1) else 0.0

    def _doing(self, what: str) -> None:
        self.doing = what
        logger.info("%s", what)
