"""Causal attention of prompt chunks over the paged KV cache, what earlier chunks wrote included.

One program takes some rows of one chunk and the query heads that share a key head: rows and heads together fill the M side of the tensor
cores' tile, so keys and values are read once for all of them, up to what the last of these rows may see.

Legend of shapes: N rows, A query heads, G key heads, D head_dim, P blocks of the cache, T row tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.kernels.gpu.paged_softmax import LOG2_E, Rows, Tile, attend_tokens, check, sizes

TILES = {
    torch.bfloat16: Tile(queries=128, tokens=32, stages=3, warps=8),
    torch.float16: Tile(queries=128, tokens=32, stages=3, warps=8),
    torch.float8_e4m3fn: Tile(queries=64, tokens=64, stages=4, warps=8),
    torch.float32: Tile(queries=64, tokens=16, stages=2, warps=8),
}
"""By the cache's dtype; found by compiling for heads of 256: with 128 queries e4m3 spills (docs/gpu.md)."""


class RowTiles(NamedTuple):
    """The rows of each program, neighbours in one chunk."""

    first_rows: tuple[int, ...]
    row_counts: tuple[int, ...]


def row_tiles(chunks: list[int], heads: int, key_heads: int, cached: torch.dtype) -> RowTiles:
    """Cut chunks of so many rows, one after the other, into tiles; what reads the most keys of a chunk comes first."""
    most = max(1, TILES[cached].queries // (heads // key_heads))
    first_rows, row_counts = [], []
    begin = 0
    for rows in chunks:
        for at in reversed(range(0, rows, most)):
            first_rows.append(begin + at)
            row_counts.append(min(most, rows - at))
        begin += rows
    return RowTiles(tuple(first_rows), tuple(row_counts))


@triton.jit(do_not_specialize_on_alignment=["tables", "starts", "contexts", "first_rows", "row_counts"])
def prefill_kernel(
    q,  # [N, A, D]
    blocks,  # [P, PAGE, G, 2, D]
    tables,
    starts,  # [N]
    contexts,  # [N]
    first_rows,  # [T]
    row_counts,  # [T]
    out,  # [N, A, D]
    score_scale,  # softmax scale x key scale x log2(e)
    value_scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + TILE_QUERIES - 1) // TILE_QUERIES
    TILE_HEADS: tl.constexpr = GROUP if HEAD_TILES == 1 else TILE_QUERIES
    first_row, rows = tl.load(first_rows + tl.program_id(0)), tl.load(row_counts + tl.program_id(0))
    key_head, head_tile = tl.program_id(1) // HEAD_TILES, tl.program_id(1) % HEAD_TILES

    query = tl.arange(0, TILE_QUERIES)
    in_group = head_tile * TILE_HEADS + query % TILE_HEADS
    is_query = (query // TILE_HEADS < rows) & (in_group < GROUP)
    row = first_row + tl.minimum(query // TILE_HEADS, rows - 1)
    dim = tl.arange(0, DIM)[None, :]
    place = ((row * HEADS + key_head * GROUP + in_group).to(tl.int64) * DIM)[:, None] + dim
    queries = tl.load(q + place, mask=is_query[:, None], other=0.0).to(OPERAND)

    end = tl.load(contexts + first_row + rows - 1)
    table, keys = tables + tl.load(starts + first_row), blocks + key_head * 2 * DIM
    sums, total, _ = attend_tokens(
        queries,
        None,
        tl.load(contexts + row),
        0,
        end,
        table,
        keys,
        score_scale,
        0,
        KEY_HEADS * 2 * DIM,
        PAGE,
        TILE_TOKENS,
        OPERAND,
    )
    attended = sums * (value_scale / total)[:, None]
    tl.store(out + place, attended.to(out.dtype.element_ty), mask=is_query[:, None])


def attend_chunks(
    rows: Rows, first_rows: Tensor, row_counts: Tensor, *, key_scale: float = 1.0, value_scale: float = 1.0
) -> Tensor:
    """Each row's queries over its context: [N, A, D] in the dtype of q.

    Of one chunk's rows each context is one more than that of the row before; none is 0. first_rows and row_counts [T] as `row_tiles` cuts
    the chunks for the cache's dtype. Dtypes, sizes, scales and what raises ValueError: as `decode_attention.attend` has them.
    """
    check(rows, {"first_rows": first_rows, "row_counts": row_counts})
    heads, dim = rows.q.shape[1:]
    key_heads = rows.blocks.shape[2]
    out = torch.empty_like(rows.q)
    if not len(first_rows):
        return out
    tile = TILES[rows.blocks.dtype]
    prefill_kernel[(len(first_rows), key_heads * triton.cdiv(heads // key_heads, tile.queries))](
        *rows,
        first_rows,
        row_counts,
        out,
        dim**-0.5 * key_scale * LOG2_E,
        value_scale,
        TILE_QUERIES=tile.queries,
        TILE_TOKENS=tile.tokens,
        **sizes(rows),
        **tile.options,
    )
    return out
