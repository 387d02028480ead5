"""What attention and FFN actors share: joining an epoch's collective group, and the thread of their step loop."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, cast

import ray
import ray.util.collective as col
import torch

from actors.collective import BACKEND, AFDGroup, register_backend
from afd_ray.config import Config
from afd_ray.engine.loop import StepLoop, Wire
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.mesh import Endpoint
from afd_ray.membership.contract import contract_digest
from afd_ray.membership.epoch import Epoch
from afd_ray.models.config import DTYPES, ModelConfig
from afd_ray.telemetry import clock_offset_ns

logger = logging.getLogger(__name__)


class Member:
    """One actor's place in an epoch. Control methods run on the actor's event loop, the step loop in a thread of its own."""

    def __init__(self, name: str, config: Config, secret: bytes, on_failure: Callable[[str], None] = lambda reason: None) -> None:
        self.name, self.config = name, config
        self.failure: str | None = None
        self._secret = secret
        self._on_failure = on_failure
        self._failed = asyncio.Event()
        self._group: AFDGroup | None = None
        self._group_name = ""
        self._wire: Wire | None = None
        self._loop: StepLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def rank(self) -> int | None:
        """Group rank in the current epoch."""
        return self._wire.rank if self._wire else None

    async def prepare(
        self, epoch: Epoch, rank: int, group_name: str, model: ModelConfig, model_digest: int, spin_us: float
    ) -> dict[str, Any]:
        """Open this member's side of the epoch's group; gives its endpoint for `connect`."""
        digest = contract_digest(model_digest, epoch, wire_dtype(self.config, model))
        register_backend()
        # Ray types the name of a backend as one of its own two.
        await asyncio.to_thread(col.init_collective_group, epoch.world_size, rank, cast(Any, BACKEND), group_name)
        group: AFDGroup = col.get_group_handle(group_name)
        dtype = wire_dtype(self.config, model)
        rows = self.config.pipeline.max_tokens_per_micro_batch
        peers = {peer: inbound_bytes(epoch, rank, peer, model, dtype, rows) for peer in epoch.peers(rank)}
        kind = self.config.handoff.kind
        if kind == "gloo" or kind == "nccl":  # spelled out: it narrows the type
            raise ValueError(f"handoff.kind: {kind} is not supported yet, use auto, shm or tcp")
        host = ray.util.get_node_ip_address()
        group.open(secret=self._secret, host=host, peers=peers, kind=kind, spin_us=spin_us, digest=digest)
        self._group, self._group_name = group, group_name
        self._wire = Wire(group.mesh, epoch, rank, dtype)
        return group.endpoint.to_dict()

    async def connect(self, endpoints: dict[int, dict[str, Any]], timeout_s: float) -> dict[int, str]:
        """Connect and warm up every edge; gives the link kind by peer. Raises LinkError or TimeoutError naming the edge."""
        group = self._require_group()
        await asyncio.to_thread(group.connect, {rank: Endpoint.from_dict(e) for rank, e in endpoints.items()}, timeout_s)
        return group.mesh.edge_kinds()

    def start(self, loop: StepLoop) -> None:
        """Run the step loop in its thread until `halt` or a failure."""
        if self._wire is None:
            raise RuntimeError(f"{self.name} has joined no epoch")
        self._loop, self.failure = loop, None
        self._failed.clear()
        events = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop, self._wire, events), name="step-loop", daemon=True)
        self._thread.start()

    async def halt(self) -> None:
        """End the step loop; harmless when there is none. Members leave only when all have halted, or they would miss each other."""
        thread, self._thread = self._thread, None
        if self._loop is not None and thread is not None:
            self._loop.stop()
            await asyncio.to_thread(thread.join)

    async def leave(self) -> None:
        """Leave the epoch's group; harmless when there is none."""
        await self.halt()
        if self._group is not None:
            self._group.mesh.close()
            await asyncio.to_thread(col.destroy_collective_group, self._group_name)
        self._group = self._wire = None

    async def lost(self) -> str:
        """Return the reason once the step loop has failed; never while it is well."""
        await self._failed.wait()
        return self.failure or "unknown"

    def identity(self) -> dict[str, Any]:
        """Where this actor runs."""
        context = ray.get_runtime_context()
        return {
            "id": self.name,
            "node": context.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "offset_ns": clock_offset_ns(),
        }

    def _run(self, loop: StepLoop, wire: Wire, events: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run(wire)
        except Exception as error:  # whatever ends the loop ends this member's part in the epoch
            logger.exception("%s: the step loop failed", self.name)
            self.failure = f"{type(error).__name__}: {error}"
            wire.mesh.close()
            self._on_failure(self.failure)
            events.call_soon_threadsafe(self._failed.set)

    def _require_group(self) -> AFDGroup:
        if self._group is None:
            raise RuntimeError(f"{self.name} has joined no epoch")
        return self._group


def wire_dtype(config: Config, model: ModelConfig) -> torch.dtype:
    """Of the rows between the halves."""
    return model.dtype if config.handoff.wire_dtype == "auto" else DTYPES[config.handoff.wire_dtype]


def compute_threads(num_cpus: float) -> int:
    """Threads for torch: the actor's share of cores, at most what the machine has."""
    return max(1, min(int(num_cpus), os.cpu_count() or 1))
