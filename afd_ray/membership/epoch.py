"""One epoch's shape: which ranks exist, which of them talk, and which experts each holds."""

from dataclasses import asdict, dataclass
from typing import Any

from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import FFNShard, Slice


@dataclass(frozen=True, slots=True)
class Epoch:
    """The members of one epoch. Group ranks: attention 0..A-1, then FFN A..A+F-1, instance by instance.

    `expert_parallel` 0: colocated, there are no FFN ranks and attention ranks exchange nothing.
    """

    number: int
    attention: int
    tensor_parallel: int
    expert_parallel: int
    micro_batches: int
    """Slots of each attention rank."""
    adaptive: bool = False
    """Whether an attention rank decides how many of them it uses."""

    @property
    def ffn(self) -> int:
        return self.tensor_parallel * self.expert_parallel

    @property
    def world_size(self) -> int:
        return self.attention + self.ffn

    @property
    def conductor(self) -> int:
        """Group rank of the FFN rank that decides which rows make up a wave."""
        return self.attention

    def ffn_rank(self, instance: int, tp_rank: int) -> int:
        """Group rank of one FFN rank."""
        return self.attention + instance * self.tensor_parallel + tp_rank

    def instance_of(self, rank: int) -> tuple[int, int]:
        """(instance, tp_rank) of the FFN member with this group rank."""
        return divmod(rank - self.attention, self.tensor_parallel)

    def instance_ranks(self, instance: int) -> tuple[int, ...]:
        return tuple(self.ffn_rank(instance, tp) for tp in range(self.tensor_parallel))

    @property
    def ffn_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.attention, self.world_size))

    def peers(self, rank: int) -> tuple[int, ...]:
        """Group ranks that `rank` exchanges messages with: A with every F; F also with its instance and the conductor."""
        if rank < self.attention:
            return self.ffn_ranks
        instance, _ = self.instance_of(rank)
        near = set(self.instance_ranks(instance)) | {self.conductor}
        if rank == self.conductor:
            near |= set(self.ffn_ranks)
        return tuple(range(self.attention)) + tuple(sorted(near - {rank}))

    def shard(self, rank: int, config: ModelConfig) -> FFNShard:
        """What the FFN member with this group rank holds: its instance's experts, tensor-parallel slices of them."""
        instance, tp_rank = self.instance_of(rank)
        experts = Slice(instance, self.expert_parallel).of(config.moe_num_experts)
        return FFNShard(
            experts=tuple(range(experts.start, experts.stop)),
            routed=Slice(tp_rank, self.tensor_parallel),
            dense=Slice(rank - self.attention, self.ffn),
        )

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError naming the setting that does not fit this model."""
        if self.expert_parallel > config.moe_num_experts:
            raise ValueError(
                f"ffn.expert_parallel must be at most the model's {config.moe_num_experts} experts, got {self.expert_parallel}"
            )
        narrowest = min(config.moe_intermediate_size, config.share_expert_dim, config.intermediate_size)
        if self.ffn > narrowest:
            raise ValueError(f"{self.ffn} FFN ranks are more than the model's narrowest FFN ({narrowest}) can be sliced into")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
