"""Assignments sorted by expert."""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from afd_ray.kernels.gpu.expert_order import ASSIGNMENTS_AT_ONCE, order_by_expert
from tests.triton_device import DEVICE, noise


def naive(ids: Tensor, experts: int, first_id: int) -> list[list[int]]:
    """The assignments of each expert, in the order of the rows."""
    flat = ids.flatten().tolist()
    return [[i for i, chosen in enumerate(flat) if chosen == first_id + expert] for expert in range(experts)]


def found(ids: Tensor, experts: int, first_id: int = 0) -> list[list[int]]:
    order = order_by_expert(ids.to(DEVICE), experts, first_id)
    starts, assignments = order.starts.tolist(), order.assignments.tolist()
    return [assignments[start:end] for start, end in pairwise(starts)]


def chosen(rows: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randint(0, experts, (rows, top_k), generator=noise(seed))


@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (7, 3), (512, 2), (513, 2), (700, 3)])
def test_each_expert_has_its_rows_in_order(rows: int, top_k: int) -> None:
    ids = chosen(rows, top_k, 6)
    assert found(ids, 6) == naive(ids, 6, 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_experts_held_elsewhere_are_left_out(dtype: torch.dtype) -> None:
    ids = chosen(50, 3, 12).to(dtype)
    assert found(ids, 4, 5) == naive(ids, 4, 5)


def test_negative_ids_are_held_nowhere() -> None:
    assert found(torch.tensor([[0, -1], [1, 0]]), 2) == [[0, 3], [2]]


def test_one_expert_may_have_all_and_others_none() -> None:
    count = ASSIGNMENTS_AT_ONCE + 1
    assert found(torch.full((count, 1), 1), 3) == [[], list(range(count)), []]


def test_no_rows_give_nobody_any() -> None:
    assert found(torch.empty(0, 3, dtype=torch.int64), 4) == [[]] * 4


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    held, first_id = rng.randrange(1, 60), rng.randrange(20)
    ids = chosen(rng.randrange(1, 900), rng.randrange(1, 5), first_id + held + rng.randrange(5), seed)
    assert found(ids, held, first_id) == naive(ids, held, first_id)


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        (torch.zeros(3), 2, "integers"),
        (torch.zeros(3, 2), 2, "integers"),
        (torch.zeros(2, 3, dtype=torch.int64).T, 2, "contiguous"),
        (torch.zeros(2, 3, dtype=torch.int64), 0, "at least 1"),
    ],
)
def test_what_it_cannot_do_is_refused(ids: Tensor, experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        order_by_expert(ids, experts)
