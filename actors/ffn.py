"""FFNActor: a Ray actor that holds a shard of the experts and keeps nothing between steps."""

import asyncio
from typing import Any

import ray

from actors.member import Member
from afd_ray.config import Config
from afd_ray.engine.ffn import FFNLoop
from afd_ray.kernels.packed import packed_ffn
from afd_ray.models.checkpoint import load_ffn
from afd_ray.models.step3 import FFNHalf, FFNShard


class FFNActor(Member):
    """One FFN rank. Its control methods answer at once; the step loop runs in a thread of its own."""

    def __init__(self, name: str, config: Config, secret: bytes) -> None:
        super().__init__(name, config, secret)
        self._loop: FFNLoop | None = None

    @ray.method
    async def load(self, shard: FFNShard) -> dict[str, Any]:
        """Load this shard's tensors, unless it is held already; gives where the actor runs."""
        if self._loop is None or self._loop.half.shard != shard:
            self._loop = await asyncio.to_thread(self._build, shard)
        return self._identity()

    @ray.method
    async def status(self) -> dict[str, Any]:
        """This actor's part of the cluster's status."""
        pace = self._config.ffn.pace
        return self._standing() | {
            "experts": list(self._ready_half().shard.experts),
            "pace": pace.model_dump() if pace else None,
        }

    def _build(self, shard: FFNShard) -> FFNLoop:
        checkpoint, dtype = self._open_checkpoint(self._config.ffn.num_cpus)
        half = packed_ffn(load_ffn(checkpoint, shard, dtype, self._progress()))
        return FFNLoop(half, self._config.ffn.pace)

    def _ready_loop(self) -> FFNLoop:
        if self._loop is None:
            raise RuntimeError("the FFN actor has not loaded its model")
        return self._loop

    def _ready_half(self) -> FFNHalf:
        return self._ready_loop().half

    def _stages(self, steps: int) -> tuple[str, int]:
        return "ffn", steps * self._ready_half().config.num_hidden_layers
