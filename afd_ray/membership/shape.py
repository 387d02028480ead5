"""How many ranks an epoch has: what is asked for, before any member has a place in it."""

from dataclasses import dataclass, replace

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
        if count is None and config.handoff.between_devices and ffn.ranks:
            count = MOST_MICRO_BATCHES  # a host that waits for no stage does not learn how long it lasts
        return cls(config.attention.replicas, ffn.tensor_parallel, ffn.ranks // ffn.tensor_parallel, count)

    def scaled(self, attention: int | None = None, ffn: int | None = None, tensor_parallel: int | None = None) -> "Shape":
        """With so many ranks; None: as it is. Raises ValueError (one line) for what cannot be."""
        for name, count in (("attention", attention), ("ffn", ffn), ("ffn tensor parallel", tensor_parallel)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        shape = self if attention is None else replace(self, attention=attention)
        if ffn is None and tensor_parallel is None:
            return shape
        if self.expert_parallel == 0:
            raise ValueError("a colocated cluster has no FFN ranks to scale")
        ranks, within = ffn or self.ffn, tensor_parallel or self.tensor_parallel
        if ranks % within:
            raise ValueError(f"ffn must be a multiple of the tensor parallel ranks of an instance ({within}), got {ranks}")
        return replace(shape, tensor_parallel=within, expert_parallel=ranks // within)

    def epoch(self, number: int) -> Epoch:
        colocated = self.expert_parallel == 0
        slots = self.micro_batches or (COLOCATED_MICRO_BATCHES if colocated else MOST_MICRO_BATCHES)
        adaptive = self.micro_batches is None and not colocated
        return Epoch(number, self.attention, self.tensor_parallel, self.expert_parallel, slots, adaptive)
