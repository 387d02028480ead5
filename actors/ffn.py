"""FFNActor: a Ray actor that holds a shard of the experts and keeps nothing between steps."""

from concurrent.futures import Future
from typing import Any, NamedTuple

import ray

from actors.aside import aside
from actors.device import compute_for
from actors.member import Member
from actors.memory import give_back
from afd_ray.config import Config
from afd_ray.engine.ffn import FFNLoop
from afd_ray.engine.look import look_at_ffn
from afd_ray.engine.loop import Wire
from afd_ray.kernels.regather import lack
from afd_ray.measured import MeasuredFFN
from afd_ray.membership.epoch import Epoch
from afd_ray.metrics import Sample, ffn_samples
from afd_ray.models.checkpoint import load_ffn, read_ffn
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard


class Standby(NamedTuple):
    """A half that is not served yet."""

    number: int
    """Of the epoch that it was loaded for."""
    half: FFNHalf


class FFNActor(Member):
    """One FFN rank. Its control methods answer at once; the step loop runs in a thread of its own."""

    def __init__(self, name: str, config: Config, secret: bytes, controller: str = "") -> None:
        super().__init__(name, config, secret, controller)
        self._loop: FFNLoop | None = None
        self._standby: Standby | None = None

    @ray.method
    async def load(self, shard: FFNShard, number: int) -> dict[str, Any]:
        """Load this shard, for the coming epoch of that number, beside the one served until `switch`.

        Gives where the actor runs, and `moved_experts`: how many experts were read, because they were not held in this form.
        """
        self._seat.load(number)
        moved, half = 0, self._half_for(shard)
        if half is None:
            held = min(self._halves(), key=lambda half: len(lack(half.shard, shard).experts), default=None)
            moved = len(lack(held.shard, shard).experts if held else shard.experts)
            half = await aside(self._build, shard, held)
            self._seat.load(number)  # a later epoch's half may be there by now
        self._keep(number, half)
        return await self._introduce() | {"moved_experts": moved}

    @ray.method
    async def status(self) -> dict[str, Any]:
        """This actor's part of the cluster's status."""
        pace = self._config.ffn.pace
        return self._standing() | {
            "experts": list(self._ready_half().shard.experts),
            "pace": pace.model_dump() if pace else None,
        }

    def _keep(self, number: int, half: FFNHalf) -> None:
        """For this epoch from now on, and no earlier one: what still comes to drop an earlier one's does not drop it."""
        if self._loop is None:
            self._loop = FFNLoop(half, self._config.ffn.pace)
            self._start_thread(self._loop)
        else:
            self._standby = None if half is self._loop.half else Standby(number, half)

    def _half_for(self, shard: FFNShard) -> FFNHalf | None:
        return next((half for half in self._halves() if half.shard == shard), None)

    def _halves(self) -> list[FFNHalf]:
        """The served one first."""
        return [*([self._loop.half] if self._loop else []), *([self._standby.half] if self._standby else [])]

    def _build(self, shard: FFNShard, held: FFNHalf | None) -> FFNHalf:
        config = self._config
        compute = compute_for(
            "ffn",
            config.ffn.num_gpus,
            quantise_experts=config.ffn.quantises,
            quantise_dense=config.ffn.quantises_dense,
            graphs=config.pipeline.cuda_graphs,
            stays=config.handoff.between_devices is not None,
        )
        checkpoint, dtype = self._open_checkpoint(self._config.ffn.num_cpus)
        keep = compute.narrow_parts
        try:
            if held is None:
                half = compute.ffn(load_ffn(checkpoint, shard, dtype, self._progress(), keep=keep))
            else:
                half = compute.regathered_ffn(
                    held, shard, lambda part, dense: read_ffn(checkpoint, part, dtype, self._progress(), dense=dense, keep=keep)
                )
            compute.warm_up_ffn(half, _most_decoding(config), narrow=config.handoff.wire_dtype == "fp8")
            return half
        finally:
            give_back()

    def _check_weights(self, epoch: Epoch, rank: int) -> None:
        if self._half_for(epoch.shard(rank, self._ready_half().config)) is None:
            raise ValueError(f"{self._name}: what rank {rank} of epoch {epoch.number} needs is not loaded")

    def _drop_weights(self, number: int) -> None:
        if self._standby is not None and self._standby.number <= number:
            self._standby = None

    def _give_up(self, reason: str) -> None:
        """Nothing waits here."""

    async def _hang_up(self) -> None:
        """Nobody listens to this actor but its peers."""

    def _enter(self, wire: Wire) -> "Future[float]":
        half = self._half_for(wire.epoch.shard(wire.rank, self._ready_half().config))
        assert half is not None  # `prepare` looked, and what drops it closes the place
        self._standby = None
        return self._ready_loop().switch(wire, half)

    def _ready_loop(self) -> FFNLoop:
        if self._loop is None:
            raise RuntimeError("the FFN actor has not loaded its model")
        return self._loop

    def _ready_half(self) -> FFNHalf:
        return self._ready_loop().half

    def _held(self) -> list[AttentionHalf | FFNHalf]:
        return [*self._halves()]

    def _look(self) -> MeasuredFFN:
        return look_at_ffn(self._ready_loop())

    def _samples(self) -> list[Sample]:
        return ffn_samples(self._name, self._look(), self._ready_lookback().recent())

    def _stages(self, steps: int) -> tuple[str, int]:
        return "ffn", steps * self._ready_half().config.num_hidden_layers


def _most_decoding(config: Config) -> int:
    """Rows of a wave, of all attention ranks that there may be without anybody asking for more."""
    grown = config.autoscaling.max.attention if config.autoscaling.policy != "fixed" else 0
    return max(config.attention.replicas, grown) * config.pipeline.most_decoding
