"""The assignments of rows to experts, sorted by expert: without atomics, so that the order is the same every time."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ASSIGNMENTS_AT_ONCE = 1024


class Order(NamedTuple):
    """Which assignments each expert has; an assignment is row * K + k."""

    starts: Tensor  # [E + 1] int32, where in `assignments` an expert's begin
    assignments: Tensor  # [N * K] int32; those of experts held elsewhere are left out, what follows the last start means nothing


@triton.jit(do_not_specialize=["count", "first_id"])
def order_kernel(ids, starts, assignments, count, first_id, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """One program an expert: it counts what comes before its own, then writes down its own."""
    expert = tl.program_id(0)
    before = tl.zeros([CHUNK], tl.int32)
    for at in range(0, count, CHUNK):
        place = at + tl.arange(0, CHUNK)
        local = tl.load(ids + place, mask=place < count, other=0).to(tl.int32) - first_id
        before += ((place < count) & (local >= 0) & (local < expert)).to(tl.int32)
    found = tl.sum(before, 0)
    tl.store(starts + expert, found)
    for at in range(0, count, CHUNK):
        place = at + tl.arange(0, CHUNK)
        local = tl.load(ids + place, mask=place < count, other=0).to(tl.int32) - first_id
        is_own = (place < count) & (local == expert)
        tl.store(assignments + found + tl.cumsum(is_own.to(tl.int32), 0) - 1, place, mask=is_own)
        found += tl.sum(is_own.to(tl.int32), 0)
    if expert == EXPERTS - 1:
        tl.store(starts + EXPERTS, found)


def order_by_expert(ids: Tensor, experts: int, first_id: int = 0) -> Order:
    """ids [N, K] of any integer dtype, contiguous, to the order in which the experts first_id..first_id + experts - 1 take the rows.

    Rows keep their order with each expert. Raises ValueError for any other shape or dtype.
    """
    if ids.dim() != 2 or not ids.is_contiguous() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers [N, K], contiguous, got {ids.dtype} {list(ids.shape)}")
    if experts < 1:
        raise ValueError(f"experts must be at least 1, got {experts}")
    order = Order(ids.new_empty(experts + 1, dtype=torch.int32), ids.new_empty(ids.numel(), dtype=torch.int32))
    order_kernel[(experts,)](ids, *order, ids.numel(), first_id, EXPERTS=experts, CHUNK=ASSIGNMENTS_AT_ONCE, num_warps=4)
    return order
