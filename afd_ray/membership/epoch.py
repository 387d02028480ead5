"""One epoch's shape: which ranks exist, which of them talk, and which experts each holds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from afd_ray.membership.experts import ExpertMap, contiguous_map, initial_map, place_experts
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import FFNShard, Slice

Dispatch = Literal["broadcast", "routed"]
DISPATCHES: tuple[Dispatch, ...] = ("broadcast", "routed")


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
    dispatch: Dispatch = "broadcast"
    """Whether every instance gets every row, or only those that need one of its experts."""
    experts: ExpertMap = ()
    """Which experts each instance holds; empty: each once, in nearly equal contiguous parts."""
    shared_at_attention: bool = False
    """Whether attention ranks compute the shared expert of their rows, while the FFN ranks compute the routed ones."""

    @property
    def routed(self) -> bool:
        """Whether rows take ways of their own: with one instance all go the same."""
        return self.dispatch == "routed" and self.expert_parallel > 1

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
        """What the FFN member with this group rank holds: its instance's experts, tensor-parallel slices of them.

        Where every instance gets every row, shared expert and dense layers are cut over the ranks of all instances, so that the
        sum of the partials counts them once. Where rows are routed each instance holds them whole, and serves the rows at home with it.
        With `shared_at_attention` none of them holds a shared expert.
        """
        instance, tp_rank = self.instance_of(rank)
        experts = self.expert_map(config)
        within = Slice(tp_rank, self.tensor_parallel)
        return FFNShard(
            experts=experts[instance],
            routed=within,
            dense=within if self.routed else Slice(rank - self.attention, self.ffn),
            first_id=sum(map(len, experts[:instance])),
            at_home=self.routed,
            shared=not self.shared_at_attention,
        )

    def with_experts(self, config: ModelConfig, dispatch: Dispatch, redundant: int, loads: Sequence[float] = ()) -> "Epoch":
        """The same ranks, with experts placed by these loads (empty: none is known yet) and `redundant` copies more.

        Raises ValueError naming the setting that does not fit this model.
        """
        if loads:
            experts = place_experts(loads, self.expert_parallel, redundant)
        else:
            experts = initial_map(config.moe_num_experts, self.expert_parallel, redundant)
        return replace(self, dispatch=dispatch, experts=experts)

    def expert_map(self, config: ModelConfig) -> ExpertMap:
        """Which experts each instance holds. A copy's id on the wire is its place in this map, counted over all instances."""
        return self.experts or contiguous_map(config.moe_num_experts, self.expert_parallel)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError naming the setting that does not fit this model."""
        if self.expert_parallel > config.moe_num_experts:
            raise ValueError(
                f"ffn.expert_parallel must be at most the model's {config.moe_num_experts} experts, got {self.expert_parallel}"
            )
        narrowest = min(config.moe_intermediate_size, config.share_expert_dim, config.intermediate_size)
        ranks = self.tensor_parallel if self.routed else self.ffn
        if ranks > narrowest:
            raise ValueError(f"{ranks} FFN ranks are more than the model's narrowest FFN ({narrowest}) can be sliced into")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
