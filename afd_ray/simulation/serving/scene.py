"""What is simulated: a configuration, and the machine that it would run on."""

from pathlib import Path
from typing import NamedTuple

from afd_ray.autoscaling.values import Goals
from afd_ray.config import Config, model_directory
from afd_ray.models.checkpoint import Checkpoint
from afd_ray.simulation.serving.cluster import Cluster, Log
from afd_ray.simulation.serving.counted import CountedRank
from afd_ray.simulation.serving.in_layers import LayerCluster
from afd_ray.simulation.serving.in_rounds import RoundCluster
from afd_ray.simulation.serving.scheduled import ScheduledRank, SlotRank
from afd_ray.simulation.serving.stages import LinearStages, Profile, Scaling, StageModel, line_of

AUTO_SLOTS = 4
"""Micro-batches that `pipeline.micro_batches: auto` may use."""
KV_BLOCKS = 8192


class Scene(NamedTuple):
    """A cluster to simulate."""

    config: Config
    stages: StageModel
    layers: int
    kv_blocks: int = KV_BLOCKS
    """Of each attention rank."""
    step_by_step: bool = False
    """Of rounds: every sequence through the live scheduler, instead of counting them."""

    @classmethod
    def of(cls, config: Config, step_by_step: bool = False) -> "Scene":
        """All from the configuration; raises ValueError in one line, naming the key, for want of stage times."""
        settings, blocks = config.simulation, config.attention.kv_cache.num_blocks
        kv_blocks = settings.kv_blocks or (KV_BLOCKS if blocks == "auto" else blocks)
        if settings.layers is not None:
            return cls(config, _stages(config), settings.layers, kv_blocks, step_by_step)
        model = Checkpoint.open(model_directory(config.model)).config
        experts = model.moe_num_experts, model.moe_top_k
        return cls(config, _stages(config, *experts), model.num_hidden_layers, kv_blocks, step_by_step)

    @property
    def slots(self) -> int:
        """Micro-batches in flight at most."""
        wanted = self.config.pipeline.micro_batches
        return AUTO_SLOTS if wanted == "auto" else wanted

    @property
    def context_limit(self) -> int:
        """Tokens of prompt and answer."""
        held = self.kv_blocks * self.config.attention.kv_cache.block_size
        return min(held, self.config.model.max_context or held)

    @property
    def goals(self) -> Goals:
        """What the policy is asked for."""
        return Goals.of(self.config.autoscaling, self.config.ffn.tensor_parallel)

    def cluster(self, log: Log, seed: int) -> Cluster:
        """Nobody in it yet."""
        config, blocks = self.config, self.kv_blocks
        budget, micro_batches = config.pipeline.max_tokens_per_micro_batch, config.pipeline.micro_batches
        sizes = {
            "blocks": blocks,
            "block_size": config.attention.kv_cache.block_size,
            "budget": budget,
            "max_running": config.pipeline.max_running_requests,
        }
        if config.simulation.detail == "layers":
            slots, adaptive = self.slots, micro_batches == "auto"
            return LayerCluster(self.stages, self.layers, lambda: SlotRank(**sizes), log, budget, slots, adaptive, seed)
        kind = ScheduledRank if self.step_by_step else CountedRank
        return RoundCluster(self.stages, self.layers, lambda costs: kind(costs=costs, **sizes), log, budget)


def _stages(config: Config, *experts: int) -> StageModel:
    """`experts`: of a layer, and of each row; none: Step-3's."""
    settings, attention, ffn = config.simulation, config.attention.pace, config.ffn.pace
    if settings.profile is not None:
        return Profile.read(Path(settings.profile))
    if attention is None or ffn is None:
        raise ValueError(
            "simulation.profile: without a file of stage times attention.pace and ffn.pace must be given (`--config simulate` has them)"
        )
    scaling: Scaling = "shared" if settings.ffn_scaling == "shared" else "routed" if config.ffn.dispatch == "routed" else "none"
    return LinearStages(line_of(attention), line_of(ffn), line_of(settings.transfer), scaling, *experts)
