"""Every row goes where its experts are, and is returned exactly once by each instance that got it."""

import itertools
from math import comb

import pytest
import torch
from torch import Tensor

from afd_ray.handoff.routing import RowRouting, ownership, row_owners
from afd_ray.membership.experts import contiguous_map, place_experts

SKEWED = [9.0, 1.0, 1.0, 5.0, 1.0, 7.0, 1.0, 2.0]


@pytest.mark.parametrize(("attention", "tensor_parallel"), list(itertools.product(range(1, 7), repeat=2)))
def test_every_row_has_one_owner(attention: int, tensor_parallel: int) -> None:
    for a_rank, rows in itertools.product(range(attention), (0, 1, 2, 3, 5, 6, 7, 64)):
        ranges = row_owners(rows, a_rank, attention, tensor_parallel)
        assert [row for owned in ranges for row in range(owned.start, owned.stop)] == list(range(rows))
        assert all(owned.start < owned.stop and 0 <= owned.tp_rank < tensor_parallel for owned in ranges)
        assert len({owned.tp_rank for owned in ranges}) == len(ranges)


def test_enough_attention_ranks_are_rail_aligned() -> None:
    assert [row_owners(9, a_rank, 5, 2)[0].tp_rank for a_rank in range(5)] == [0, 1, 0, 1, 0]


def test_few_attention_ranks_are_split_in_balance() -> None:
    sizes = [owned.stop - owned.start for owned in row_owners(11, 0, 1, 4)]
    assert sizes == [3, 3, 3, 2]


def test_a_rank_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="a_rank is 2, it must be from 0"):
        row_owners(1, 2, 2, 1)


def test_the_rows_of_all_attention_ranks_lie_one_after_the_other() -> None:
    rows = (3, 0, 5)
    owned = ownership(rows, 4)
    assert [row for o in owned for row in range(o.start, o.stop)] == list(range(8))
    assert [(o.attention, o.first_row + i) for o in owned for i in range(o.stop - o.start)] == [
        (a_rank, row) for a_rank, count in enumerate(rows) for row in range(count)
    ]


def uniform(rows: int, experts: int, top_k: int) -> Tensor:
    """Distinct experts of each row, all equally likely."""
    return torch.rand(rows, experts, generator=torch.Generator().manual_seed(6)).topk(top_k, dim=-1).indices


@pytest.mark.parametrize(("experts", "top_k", "instances"), [(16, 3, 4), (48, 3, 8), (64, 6, 4), (8, 1, 2)])
def test_a_row_visits_an_instance_as_often_as_the_formula_says(experts: int, top_k: int, instances: int) -> None:
    routing = RowRouting(contiguous_map(experts, instances), routed=True)
    ids = routing.choose_copies(uniform(100_000, experts, top_k))
    held = experts // instances
    expected = 1 - comb(experts - held, top_k) / comb(experts, top_k)
    for rows in routing.rows_by_instance(ids, len(ids)):
        assert rows is not None
        assert len(rows) / len(ids) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("redundant", [0, 3, 16])
def test_rows_go_to_the_instances_that_hold_their_experts_and_no_others(redundant: int) -> None:
    placed = place_experts(SKEWED, 3, redundant)
    flat = [(instance, expert) for instance, held in enumerate(placed) for expert in held]
    routing, experts = RowRouting(placed, routed=True), uniform(50, 8, 3)
    ids = routing.choose_copies(experts)
    assert [[flat[i][1] for i in row] for row in ids.tolist()] == experts.tolist()
    visited = routing.rows_by_instance(ids, len(ids))
    for instance, rows in enumerate(visited):
        assert rows is not None
        assert rows.tolist() == [n for n, row in enumerate(ids.tolist()) if instance in {flat[i][0] for i in row}]


def test_a_routed_row_takes_a_copy_in_an_instance_that_it_goes_to_anyway() -> None:
    placed = ((0, 1, 4), (0, 2, 4), (0, 3, 4))
    routing = RowRouting(placed, routed=True)
    experts = torch.tensor([[0, 4, 2], [4, 3, 0], [1, 0, 4], [0, 4, 0]])
    visits = [
        [i for i, rows in enumerate(routing.rows_by_instance(routing.choose_copies(experts), 4)) if n in rows] for n in range(4)
    ]
    assert visits == [[1], [2], [0], [0]]


@pytest.mark.parametrize("routed", [False, True])
def test_rows_take_copies_in_turn(routed: bool) -> None:
    routing = RowRouting(((0, 1), (0, 2), (0, 3)), routed)
    assert routing.choose_copies(torch.zeros(6, 1, dtype=torch.int64)).flatten().tolist() == [0, 2, 4, 0, 2, 4]


def test_a_broadcast_row_goes_everywhere() -> None:
    routing = RowRouting(contiguous_map(8, 3), routed=False)
    assert routing.rows_by_instance(uniform(5, 8, 2), 5) == [None] * 3


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_rows_of_a_dense_layer_are_dealt_to_the_instances(rows: int) -> None:
    dealt = RowRouting(contiguous_map(8, 3), routed=True).rows_by_instance(None, rows)
    assert [part.tolist() for part in dealt if part is not None] == [list(range(i, rows, 3)) for i in range(3)]
