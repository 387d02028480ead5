"""Decode attention over the paged KV cache, for query heads that share key heads: MFA, MQA and GQA.

One program takes a row, up to 64 query heads that share a key head, and a span of the row's tokens: the heads fill the M side of the
tensor cores' tile, so keys and values are read once for all of them. The spans of a row are combined by a second kernel.

What attention gives may be in e4m3 at once, for a product that takes that: the last kernel quantises what it has rounded.

Legend of shapes: N rows, A query heads, G key heads, D head_dim, P blocks of the cache, S splits of a row's tokens, M heads of a program,
B blocks of a head that share a scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK
from afd_ray.kernels.gpu.e4m3 import quantised
from afd_ray.kernels.gpu.paged_softmax import LOG2_E, Rows, Tile, attend_tokens, check, rounded, sizes
from afd_ray.models.step3 import Narrow

FEWEST_HEADS = 16
"""M of the smallest tensor-core tile; fewer heads leave it partly empty."""
MOST_SPLITS = 32
SHORTEST_SPLIT = 256
"""Tokens of a span, unless the row has fewer: shorter ones cost more to combine than they gain."""


TILES = {
    torch.bfloat16: Tile(queries=64, tokens=64, stages=3, warps=8),
    torch.float16: Tile(queries=64, tokens=64, stages=3, warps=8),
    torch.float8_e4m3fn: Tile(queries=64, tokens=64, stages=4, warps=8),
    torch.float32: Tile(queries=64, tokens=16, stages=2, warps=4),
}
"""By the cache's dtype; found by compiling for heads of 256: deeper or larger ones spill or do not fit (docs/gpu.md).

64 queries are M of one wgmma; more heads to a key head take several programs.
"""


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["tables", "starts", "contexts"])
def attend_kernel(
    q,  # [N, A, D + ROTARY]
    blocks,  # [P, PAGE, G, 2, D]; with a rotary part [P, PAGE, D + ROTARY]
    tables,
    starts,  # [N]
    contexts,  # [N]
    out,  # [N, A, D]; with splits [S, N, A, D] float32
    exponents,  # [N, A, B] uint8 of an `out` in e4m3, or None
    weights,  # [S, N, A] float32: log2 of the sum of a span's exponentials
    score_scale,  # softmax scale x key scale x log2(e)
    value_scale,
    splits,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SHORTEST: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of both products' operands
    ROUNDED: tl.constexpr,  # dtype of the model; with splits float32
    BLOCK: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    TOKEN_STRIDE: tl.constexpr = DIM + ROTARY if ROTARY > 0 else KEY_HEADS * 2 * DIM
    row, key_head, split = tl.program_id(1), tl.program_id(0) // HEAD_TILES, tl.program_id(2)

    in_group = tl.program_id(0) % HEAD_TILES * TILE_HEADS + tl.arange(0, TILE_HEADS)
    is_head = in_group < GROUP
    head = key_head * GROUP + in_group
    dim = tl.arange(0, DIM)[None, :]
    query = q + (row * HEADS + head)[:, None] * (DIM + ROTARY)
    queries = tl.load(query + dim, mask=is_head[:, None], other=0.0).to(OPERAND)
    rotary_queries = None
    if ROTARY > 0:
        rotary = query + DIM + tl.arange(0, ROTARY)[None, :]
        rotary_queries = tl.load(rotary, mask=is_head[:, None], other=0.0).to(OPERAND)

    context = tl.load(contexts + row)
    first, end = 0, context
    if IS_SPLIT:
        span = _span(context, splits, SHORTEST, TILE_TOKENS)
        first = split * span
        end = tl.minimum(first + span, context)
        if first >= context:
            return
    limits = tl.full([TILE_HEADS], 0, tl.int32) + end
    table, keys = tables + tl.load(starts + row), blocks + key_head * 2 * DIM
    sums, total, highest = attend_tokens(
        queries, rotary_queries, limits, first, end, table, keys, score_scale, ROTARY, TOKEN_STRIDE, PAGE, TILE_TOKENS, OPERAND
    )

    # A row of no tokens, which pads a batch, gives zeros.
    attended = sums * (value_scale / tl.where(total > 0.0, total, 1.0))[:, None]
    place = ((split * tl.num_programs(1) + row) * HEADS + head).to(tl.int64)
    _store(out, exponents, place, attended.to(ROUNDED), is_head, BLOCK)
    if IS_SPLIT:
        tl.store(weights + place, highest + tl.log2(total), mask=is_head)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["contexts"])
def combine_kernel(
    parts,  # [S, N, A, D] float32
    weights,  # [S, N, A] float32
    contexts,  # [N]
    out,  # [N, A, D]
    exponents,  # [N, A, B] uint8 of an `out` in e4m3, or None
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    ROUNDED: tl.constexpr,  # dtype of the model
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(contexts + row)
    split, dim = tl.arange(0, PADDED_SPLITS), tl.arange(0, DIM)
    is_used = (split < splits) & (split * _span(context, splits, SHORTEST, TILE_TOKENS) < context)
    place = ((split * tl.num_programs(0) + row) * HEADS + head).to(tl.int64)
    # Finite, so that a row of no tokens, whose parts all read as zeros, gives zeros.
    logs = tl.load(weights + place, mask=is_used, other=-1e30)
    shares = tl.exp2(logs - tl.max(logs, 0))
    attended = tl.load(parts + place[:, None] * DIM + dim[None, :], mask=is_used[:, None], other=0.0)
    mean = tl.sum(attended * shares[:, None], 0, keep_dims=True) / tl.sum(shares, 0)
    only = tl.arange(0, 1)
    _store(out, exponents, (row * HEADS + head).to(tl.int64) + only, mean.to(ROUNDED), only == 0, BLOCK)


@triton.jit
def _store(out, exponents, place, attended, is_head, BLOCK: tl.constexpr):
    """Heads [M, D] as the model rounds them, where place [M] counts all rows' heads; in e4m3 where there are exponents."""
    M: tl.constexpr = attended.shape[0]
    DIM: tl.constexpr = attended.shape[1]
    if exponents is not None:
        BLOCKS: tl.constexpr = DIM // BLOCK
        attended, exponent = quantised(tl.reshape(attended.to(tl.float32), [M * BLOCKS, BLOCK]))
        attended = tl.reshape(attended, [M, DIM])
        of_head = exponents + place[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        tl.store(of_head, tl.reshape(exponent, [M, BLOCKS]), mask=is_head[:, None])
    tl.store(out + place[:, None] * DIM + tl.arange(0, DIM)[None, :], attended, mask=is_head[:, None])


@triton.jit
def _span(context, splits, SHORTEST: tl.constexpr, TILE_TOKENS: tl.constexpr):
    """Tokens of each of a row's splits: whole tiles, as equal as they can be; the last splits of a short row have none."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, splits), TILE_TOKENS) * TILE_TOKENS, SHORTEST)


def splits_for(programs: int, multiprocessors: int) -> int:
    """Into how many splits a row's tokens go, where `programs` (rows x tiles of heads) would run without, one to a multiprocessor.

    The fewest that keep the multiprocessors at least nine tenths as busy as the best number would.
    It does not depend on the contexts, so that a captured graph serves any.
    """
    if programs < 1:
        return 1
    busy = {splits: _busy(programs * splits, multiprocessors) for splits in range(1, MOST_SPLITS + 1)}
    return next(splits for splits, share in busy.items() if share >= 0.9 * max(busy.values()))


def padded(splits: int) -> int:
    """All numbers of splits for which this is the same need the same kernels."""
    size: int = triton.next_power_of_2(splits)
    return size


def _busy(programs: int, multiprocessors: int) -> float:
    """Share of the multiprocessors' time that equally long programs fill."""
    rounds = -(-programs // multiprocessors)
    return programs / (rounds * multiprocessors)


def attend(rows: Rows, *, splits: int, key_scale: float = 1.0, value_scale: float = 1.0) -> Tensor:
    """Each row's queries over its context: [N, A, D] in the dtype of q.

    blocks contiguous, `PagedCache.blocks[layer]` with G = 1; D and block_size are powers of two. float32, bfloat16, float16, or e4m3 times
    `key_scale` and `value_scale`, which is computed in float16: it holds every e4m3 value, and q must be within its range.
    A context may be 0. splits from 1 to 32, see `splits_for`. Raises ValueError for any other shape or dtype.
    """
    check(rows, {})
    score_scale = rows.q.shape[2] ** -0.5 * key_scale
    return attend_in_splits(rows, TILES[rows.blocks.dtype], splits, score_scale, value_scale, sizes(rows) | {"ROTARY": 0})


def attend_narrow(rows: Rows, into: Narrow, *, splits: int, key_scale: float = 1.0, value_scale: float = 1.0) -> None:
    """What `attend` gives as `quantise_rows` quantises it, [N, A * D], contiguous, but without that launch.

    Raises ValueError as `attend` does, and where blocks are not within heads (`quantises_heads`).
    """
    check(rows, {})
    count, heads, dim = rows.q.shape
    if not quantises_heads(dim):
        raise ValueError(f"head_dim must be a multiple of {BLOCK} for heads in e4m3, got {dim}")
    shapes = [tuple(tensor.shape) for tensor in into]
    if shapes != [(count, heads * dim), (count, heads * dim // BLOCK)]:
        raise ValueError(f"what is attended needs room for its values and exponents, got {shapes}")
    score_scale, constants = dim**-0.5 * key_scale, sizes(rows) | {"ROTARY": 0}
    _launch(rows, TILES[rows.blocks.dtype], splits, (score_scale, value_scale), constants, *into)


def quantises_heads(dim: int) -> bool:
    """Whether heads of that size can be given in e4m3."""
    return dim % BLOCK == 0


def attend_in_splits(
    rows: Rows, tile: Tile, splits: int, score_scale: float, value_scale: float, constants: Mapping[str, Any]
) -> Tensor:
    """Both kernels over checked rows; `constants` are the sizes that `attend_kernel` is compiled for."""
    out = rows.q.new_empty(len(rows.q), constants["HEADS"], constants["DIM"])
    _launch(rows, tile, splits, (score_scale, value_scale), constants, out, None)
    return out


def _launch(
    rows: Rows,
    tile: Tile,
    splits: int,
    scales: tuple[float, float],
    constants: Mapping[str, Any],
    out: Tensor,
    exponents: Tensor | None,
) -> None:
    """`scales`: of scores and values."""
    if not 1 <= splits <= MOST_SPLITS:
        raise ValueError(f"splits must be from 1 to {MOST_SPLITS}, got {splits}")
    count, heads, key_heads, dim = len(rows.q), constants["HEADS"], constants["KEY_HEADS"], constants["DIM"]
    if not count:
        return
    is_split, dtype = splits > 1, rounded(rows.q.dtype)
    parts = out.new_empty(splits, count, heads, dim, dtype=torch.float32) if is_split else out
    weights = out.new_empty(splits, count, heads, dtype=torch.float32)
    tile_heads = min(tile.queries, max(FEWEST_HEADS, triton.next_power_of_2(heads // key_heads)))
    span = {"splits": splits, "SHORTEST": SHORTEST_SPLIT, "TILE_TOKENS": tile.tokens, "BLOCK": BLOCK}
    # The tiles of one row's heads are neighbours: what one reads, the others find in the L2 cache.
    attend_kernel[(key_heads * triton.cdiv(heads // key_heads, tile_heads), count, splits)](
        *rows,
        parts,
        None if is_split else exponents,
        weights,
        scales[0] * LOG2_E,
        scales[1],
        TILE_HEADS=tile_heads,
        IS_SPLIT=is_split,
        ROUNDED=tl.float32 if is_split else dtype,
        **span,
        **constants,
        **tile.options,
    )
    if is_split:
        sizes = {"HEADS": heads, "DIM": dim, "PADDED_SPLITS": padded(splits), "ROUNDED": dtype}
        combine_kernel[(count, heads)](parts, weights, rows.contexts, out, exponents, **sizes, **span)
