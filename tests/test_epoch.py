"""One epoch's shape: ranks, peers, shards."""

from itertools import product

import pytest

from afd_ray.membership.epoch import Epoch
from afd_ray.models.presets import PRESETS

TINY = PRESETS["step3-tiny"]
SHAPES = list(product((1, 2, 3), (1, 2, 3), (1, 2, 4)))


@pytest.mark.parametrize(("attention", "tensor", "expert"), SHAPES)
def test_peers_are_mutual_and_attention_sees_every_ffn_rank(attention: int, tensor: int, expert: int) -> None:
    epoch = Epoch(1, attention, tensor, expert, 2)
    for rank in range(epoch.world_size):
        assert rank not in epoch.peers(rank)
        assert all(rank in epoch.peers(peer) for peer in epoch.peers(rank))
    assert all(epoch.peers(rank) == epoch.ffn_ranks for rank in range(attention))


@pytest.mark.parametrize(("attention", "tensor", "expert"), SHAPES)
def test_every_expert_column_is_held_exactly_once(attention: int, tensor: int, expert: int) -> None:
    epoch = Epoch(1, attention, tensor, expert, 2)
    shards = [epoch.shard(rank, TINY) for rank in epoch.ffn_ranks]
    width = TINY.moe_intermediate_size
    routed = [(e, c) for s in shards for e in s.experts for c in range(*s.routed.of(width).indices(width))]
    assert sorted(routed) == list(product(range(TINY.moe_num_experts), range(width)))
    dense = [c for s in shards for c in range(*s.dense.of(TINY.intermediate_size).indices(TINY.intermediate_size))]
    assert sorted(dense) == list(range(TINY.intermediate_size))


@pytest.mark.parametrize(("attention", "tensor", "expert"), SHAPES)
def test_where_rows_are_routed_each_instance_holds_all_that_is_not_routed(attention: int, tensor: int, expert: int) -> None:
    epoch = Epoch(1, attention, tensor, expert, 2, dispatch="routed")
    shards = [epoch.shard(rank, TINY) for rank in epoch.ffn_ranks]
    dense = [c for s in shards for c in range(*s.dense.of(TINY.intermediate_size).indices(TINY.intermediate_size))]
    assert sorted(dense) == sorted(list(range(TINY.intermediate_size)) * expert)
    assert all(shard.at_home == (expert > 1) for shard in shards)


def test_a_shard_knows_the_ids_of_its_copies_on_the_wire() -> None:
    epoch = Epoch(1, 1, 2, 3, 1, dispatch="routed", experts=((0, 1, 2, 3), (3, 4, 5), (0, 6, 7)))
    shards = [epoch.shard(rank, TINY) for rank in epoch.ffn_ranks]
    assert [(shard.first_id, shard.experts) for shard in shards[::2]] == [(0, (0, 1, 2, 3)), (4, (3, 4, 5)), (7, (0, 6, 7))]
    assert [shard.experts for shard in shards[::2]] == [shard.experts for shard in shards[1::2]]


def test_too_many_instances_for_the_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ffn.expert_parallel must be at most the model's 8 experts, got 9"):
        Epoch(1, 1, 1, 9, 1).check(TINY)
    with pytest.raises(ValueError, match="48 FFN ranks are more than"):
        Epoch(1, 1, 6, 8, 1).check(TINY)
