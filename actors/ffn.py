"""FFNActor: a Ray actor that holds a shard of the experts and keeps nothing between steps."""

import asyncio
from typing import Any

import ray
import torch

from actors.member import Member, compute_threads
from actors.memory import resident_bytes
from actors.tracing import count_calls, trace_steps
from afd_ray.config import Config, model_directory
from afd_ray.engine.ffn import FFNLoop
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_ffn
from afd_ray.models.checkpoint import digest as checkpoint_digest
from afd_ray.models.config import DTYPES
from afd_ray.models.step3 import FFNShard


class FFNActor:
    """One FFN rank. Its control methods answer at once; the step loop runs in a thread of its own."""

    def __init__(self, name: str, config: Config, secret: bytes) -> None:
        self._config = config
        self._model_digest = 0
        self._member = Member(name, config, secret)
        self._loop: FFNLoop | None = None

    @ray.method
    async def load(self, shard: FFNShard) -> dict[str, Any]:
        """Load this shard's tensors, unless it is held already; gives where the actor runs."""
        if self._loop is None or self._loop.half.shard != shard:
            self._loop = await asyncio.to_thread(self._build, shard)
        return self._member.identity() | {"model_digest": self._model_digest}

    @ray.method
    async def prepare(self, epoch: Epoch, rank: int, group_name: str, spin_us: float) -> dict[str, Any]:
        """Open this actor's side of the epoch's group; gives its endpoint."""
        return await self._member.prepare(epoch, rank, group_name, self._ready_loop().half.config, self._model_digest, spin_us)

    @ray.method
    async def connect(self, endpoints: dict[int, dict[str, Any]], timeout_s: float) -> dict[int, str]:
        """Connect and warm up every edge; gives the link kind by peer."""
        return await self._member.connect(endpoints, timeout_s)

    @ray.method
    async def start(self) -> None:
        """Begin to serve in the prepared epoch."""
        self._member.start(self._ready_loop())

    @ray.method
    async def halt(self) -> None:
        """Stop serving."""
        await self._member.halt()

    @ray.method
    async def leave(self) -> None:
        """Leave the epoch's group, once every member has halted."""
        await self._member.leave()

    @ray.method
    async def lost(self) -> str:
        """Return the reason once the step loop has failed; never while it is well."""
        return await self._member.lost()

    @ray.method
    async def status(self) -> dict[str, Any]:
        """This actor's part of the cluster's status."""
        loop, pace = self._ready_loop(), self._config.ffn.pace
        return {
            "failure": self._member.failure,
            "rank": self._member.rank,
            "experts": list(loop.half.shard.experts),
            "pace": pace.model_dump() if pace else None,
            "totals": loop.recorder.totals(),
        }

    @ray.method
    async def trace(self, steps: int, timeout_s: float) -> dict[str, Any]:
        """The stage events until `steps` waves have passed through all layers, or of those that came within the timeout."""
        loop = self._ready_loop()
        layers = loop.half.config.num_hidden_layers
        return self._member.identity() | {"events": await trace_steps(loop, "ffn", steps * layers, timeout_s)}

    @ray.method
    async def count_ray_calls(self, steps: int, timeout_s: float) -> dict[str, int]:
        """Calls on the step loop's thread over the next `steps` waves, and how many of them go into Ray."""
        loop = self._ready_loop()
        return await count_calls(loop, "ffn", steps * loop.half.config.num_hidden_layers, timeout_s)

    @ray.method
    async def resident_bytes(self) -> dict[str, int]:
        """Memory: resident set of the process, and the weights held."""
        return await asyncio.to_thread(resident_bytes, self._ready_loop().half)

    def _build(self, shard: FFNShard) -> FFNLoop:
        torch.set_num_threads(compute_threads(self._config.ffn.num_cpus))
        checkpoint = Checkpoint.open(model_directory(self._config.model))
        self._model_digest = checkpoint_digest(checkpoint)
        dtype = checkpoint.config.dtype if self._config.model.dtype == "auto" else DTYPES[self._config.model.dtype]
        return FFNLoop(load_ffn(checkpoint, shard, dtype), self._config.ffn.pace)

    def _ready_loop(self) -> FFNLoop:
        if self._loop is None:
            raise RuntimeError("the FFN actor has not loaded its model")
        return self._loop
