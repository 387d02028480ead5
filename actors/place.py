"""A member's place in one epoch: its side of the epoch's collective group, opened beside the one it serves in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.aside import aside
from actors.collective import AFDGroup, join_group, leave_group
from actors.device import DeviceLinks, links_for
from afd_ray.config import Config
from afd_ray.engine.loop import Wire
from afd_ray.handoff.capacity import frame_bytes, inbound_bytes
from afd_ray.handoff.device.carrier import places_for
from afd_ray.handoff.mesh import Endpoint, LinkKind
from afd_ray.handoff.rows import WIRE_DTYPES
from afd_ray.handoff.terms import DeviceLinkKind
from afd_ray.membership.contract import contract_digest
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import ModelConfig

SILENT_SHARE = 2 / 3
"""Of the time in which a loss must be noticed: the kernel looks a little later than it is told to."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a member brings to every group."""

    config: Config
    model: ModelConfig
    model_digest: int
    secret: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Open, and once connected what a step loop can serve in."""

    group: AFDGroup
    wire: Wire

    @classmethod
    async def open(cls, terms: Terms, epoch: Epoch, rank: int, group_name: str, spin_us: float) -> "Place":
        """Nothing is left behind when it fails."""
        return await aside(_open, terms, epoch, rank, group_name, spin_us)

    async def connect(self, endpoints: Mapping[int, Mapping[str, Any]], timeout_s: float) -> dict[int, str]:
        """Connect and warm up every edge; gives the link kind by peer. Raises LinkError naming the edge."""
        peers = {rank: Endpoint.from_dict(endpoint) for rank, endpoint in endpoints.items()}
        await aside(self.group.connect, peers, timeout_s)
        return self.group.mesh.edge_kinds()

    async def close(self) -> None:
        """Leave the group: the peers' links to this member break."""
        await aside(_close, self.group)


def _open(terms: Terms, epoch: Epoch, rank: int, group_name: str, spin_us: float) -> Place:
    config, model = terms.config, terms.model
    dtype = wire_dtype(config, model)
    rows = config.pipeline.max_tokens_per_micro_batch
    peers = {peer: inbound_bytes(epoch, rank, peer, model, dtype, rows) for peer in epoch.peers(rank)}
    contract = contract_digest(terms.model_digest, epoch, dtype)
    host = ray.util.get_node_ip_address()
    group = join_group(epoch.world_size, rank, group_name)
    try:
        group.open(
            secret=terms.secret,
            host=host,
            peers=peers,
            kind=_host_kind(config),
            spin_us=spin_us,
            digest=contract,
            silence_s=config.failure.detect_timeout_s * SILENT_SHARE,
        )
        between = config.handoff.between_devices
        if between is not None:
            group.carry(*_device_links(between, terms, epoch, rank, dtype))
    except BaseException:
        leave_group(group_name)
        raise
    return Place(group, Wire(group.mesh, epoch, rank, dtype))


def _host_kind(config: Config) -> LinkKind:
    """Of the links between hosts, that carry headers in any case."""
    kind = config.handoff.kind
    return "auto" if kind == "ipc" or kind == "nccl" else kind


def _device_links(kind: DeviceLinkKind, terms: Terms, epoch: Epoch, rank: int, dtype: torch.dtype) -> DeviceLinks:
    config, model = terms.config, terms.model
    rows = config.pipeline.max_tokens_per_micro_batch
    peers = {peer: frame_bytes(epoch, rank, peer, model, dtype, rows) for peer in epoch.peers(rank)}
    if kind == "nccl":  # what it does not carry needs no places
        peers = {peer: size_bytes if min(rank, peer) < epoch.attention else 0 for peer, size_bytes in peers.items()}
    lingers = rank >= epoch.attention
    return links_for(kind, rank, peers, places_for(epoch.micro_batches), shares_gpu=config.shares_gpus, lingers=lingers)


def _close(group: AFDGroup) -> None:
    group.mesh.close()  # before Ray's process-wide lock, which the opening of another group may hold
    leave_group(group.group_name)


def wire_dtype(config: Config, model: ModelConfig) -> torch.dtype:
    """Of the hidden rows from attention to FFN."""
    return model.dtype if config.handoff.wire_dtype == "auto" else WIRE_DTYPES[config.handoff.wire_dtype]
