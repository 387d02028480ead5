"""The router's choice: softmax over all experts and its top-k, a row in one warp.

Legend of shapes: N rows, E experts, K top-k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_A_PROGRAM = 4
MOST_EXPERTS = 1024


@triton.jit(do_not_specialize=["rows"])
def route_kernel(
    logits,  # [N, E]
    experts,  # [N, K] int32
    weights,  # [N, K]
    rows,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    expert = tl.arange(0, PADDED_EXPERTS)[None, :]
    is_expert = (row < rows)[:, None] & (expert < EXPERTS)
    scores = tl.load(logits + row[:, None] * EXPERTS + expert, mask=is_expert, other=0.0).to(tl.float32)
    scores = tl.where(expert < EXPERTS, scores, float("-inf"))
    exponentials = tl.exp(scores - tl.max(scores, 1)[:, None])
    shares = exponentials / tl.sum(exponentials, 1)[:, None]

    left = tl.where(expert < EXPERTS, shares, -1.0)
    position = tl.arange(0, PADDED_TOP_K)[None, :]
    ids = tl.zeros([TILE_ROWS, PADDED_TOP_K], tl.int32)
    chosen = tl.zeros([TILE_ROWS, PADDED_TOP_K], tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(left, 1, tie_break_left=True)[:, None]
        ids = tl.where(position == k, best, ids)
        chosen = tl.where(position == k, tl.max(left, 1)[:, None], chosen)
        left = tl.where(expert == best, -1.0, left)
    if NORMALISE:
        chosen = chosen / tl.sum(chosen, 1)[:, None]

    place = row[:, None] * TOP_K + position
    is_place = (row < rows)[:, None] & (position < TOP_K)
    tl.store(experts + place, ids, mask=is_place)
    tl.store(weights + place, chosen.to(weights.dtype.element_ty), mask=is_place)


def route(logits: Tensor, top_k: int, normalise: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """logits [N, E] to ids [N, K] int32, best first, and weights [N, K] of `dtype`: what `step3.route` gives.

    Of equal experts the one with the lower id goes first. float32, bfloat16 or float16, contiguous, E at most 1024.
    Raises ValueError for any other shape or dtype.
    """
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MOST_EXPERTS or not logits.is_contiguous():
        raise ValueError(f"logits must be [N, E], contiguous, with 1 to {MOST_EXPERTS} experts, got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"no kernel for logits {logits.dtype}")
    rows, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be from 1 to {experts}, got {top_k}")
    ids = logits.new_empty(rows, top_k, dtype=torch.int32)
    weights = logits.new_empty(rows, top_k, dtype=dtype)
    if rows:
        route_kernel[(triton.cdiv(rows, ROWS_A_PROGRAM),)](
            logits,
            ids,
            weights,
            rows,
            EXPERTS=experts,
            PADDED_EXPERTS=triton.next_power_of_2(experts),
            TOP_K=top_k,
            PADDED_TOP_K=triton.next_power_of_2(top_k),
            NORMALISE=normalise,
            TILE_ROWS=ROWS_A_PROGRAM,
            num_warps=ROWS_A_PROGRAM,
        )
    return ids, weights
