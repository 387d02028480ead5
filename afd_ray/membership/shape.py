"""How many ranks an epoch has: what is asked for, before any member has a place in it."""

from dataclasses import dataclass

from afd_ray.config import Config
from afd_ray.membership.epoch import Epoch

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

    def __str__(self) -> str:
        ffn = f"{self.expert_parallel} x {self.tensor_parallel}" if self.expert_parallel else "no"
        return f"{self.attention} attention and {ffn} FFN ranks"

    @property
    def ffn(self) -> int:
        """FFN ranks."""
        return self.tensor_parallel * self.expert_parallel

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
