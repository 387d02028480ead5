"""What decode and prefill attention share: a tile of queries over a span of a sequence's tokens, block by block of the cache.

Legend of shapes: N rows, A query heads, G key heads, D head_dim, P blocks of the cache, M queries of a program.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
CACHED = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Rows(NamedTuple):
    """Queries, and where each row finds its keys and values: in the first contexts[row] tokens of the blocks tables[starts[row]:]."""

    q: Tensor  # [N, A, D]
    blocks: Tensor  # [P, block_size, G, 2, D], a token's key heads, each beside its value head; latents [P, block_size, L + R]
    tables: Tensor  # [.] int32
    starts: Tensor  # [N] int32
    contexts: Tensor  # [N] int32


class Tile(NamedTuple):
    """How a program goes through its tokens."""

    queries: int
    """Rows x heads, at most: M of the tensor cores' tile."""
    tokens: int
    stages: int
    """Tiles of keys and values on their way at a time."""
    warps: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@triton.jit
def attend_tokens(
    queries,  # [M, D]
    rotary_queries,  # [M, ROTARY]; None with ROTARY = 0
    limits,  # [M], each at least first + 1: the tokens that a query may see end there
    first,
    end,  # of the span
    table,  # the sequence's blocks
    keys,  # of token slot 0, the key head's; behind it the value head or, where the key is the value too, the key's rotary part
    score_scale,  # softmax scale x key scale x log2(e)
    ROTARY: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of both products' operands
):
    """Sums of values [M, D] and of exponentials [M], both relative to 2^highest, and highest [M]."""
    M: tl.constexpr = queries.shape[0]
    DIM: tl.constexpr = queries.shape[1]
    dim = tl.arange(0, DIM)[None, :]
    token = first + tl.arange(0, TILE_TOKENS)
    pages = tl.load(table + token // PAGE, mask=token < end, other=0)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, DIM], tl.float32)
    for at in range(first, end, TILE_TOKENS):
        token = at + tl.arange(0, TILE_TOKENS)
        held = keys + (pages.to(tl.int64) * PAGE + token % PAGE)[:, None] * TOKEN_STRIDE
        # A tile ahead: a lookup in the tile that needs it would leave no more than two tiles on their way.
        pages = tl.load(table + (token + TILE_TOKENS) // PAGE, mask=token + TILE_TOKENS < end, other=0)
        is_token = (token < end)[:, None]
        key_tile = tl.load(held + dim, mask=is_token, other=0.0).to(OPERAND)
        scores = tl.dot(queries, key_tile.T, input_precision="ieee")
        if ROTARY > 0:
            rotary_tile = tl.load(held + DIM + tl.arange(0, ROTARY)[None, :], mask=is_token, other=0.0).to(OPERAND)
            scores = tl.dot(rotary_queries, rotary_tile.T, scores, input_precision="ieee")
        scores = tl.where(token[None, :] < limits[:, None], scores * score_scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        exponentials = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(exponentials, 1)
        highest = new_highest
        values = key_tile if ROTARY > 0 else tl.load(held + DIM + dim, mask=is_token, other=0.0).to(OPERAND)
        sums = tl.dot(exponentials.to(OPERAND), values, sums * shrink[:, None], input_precision="ieee")
    return sums, total, highest


def operand(cached: torch.dtype) -> tl.dtype:
    """What the products are computed in. e4m3 to float16 takes a fifth of the instructions of e4m3 to bfloat16, which would set the speed."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}.get(cached, tl.float16)


def rounded(given: torch.dtype) -> tl.dtype:
    """What attended values are rounded to, before all else, with queries of dtype `given`."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}.get(given, tl.float16)


def sizes(rows: Rows) -> dict[str, Any]:
    """What the kernels over key and value heads are compiled for."""
    (_, heads, dim), (_, page, key_heads, _, _) = rows.q.shape, rows.blocks.shape
    return {"HEADS": heads, "KEY_HEADS": key_heads, "DIM": dim, "PAGE": page, "OPERAND": operand(rows.blocks.dtype)}


def check(rows: Rows, per_tile: dict[str, Tensor]) -> None:
    """Raises ValueError unless q and blocks are those of key and value heads, the others int32 of a length each, and all contiguous."""
    q, blocks = rows.q, rows.blocks
    if q.dim() != 3 or blocks.dim() != 5 or blocks.shape[3] != 2 or blocks.shape[4] != q.shape[2]:
        raise ValueError(f"q must be [N, A, D] and blocks [P, block_size, G, 2, D], got {list(q.shape)} and {list(blocks.shape)}")
    heads, dim = q.shape[1:]
    page, key_heads = blocks.shape[1:3]
    if heads % key_heads:
        raise ValueError(f"query heads must be a multiple of the key heads, got {heads} and {key_heads}")
    if dim < 16 or dim & dim - 1 or page & page - 1:
        raise ValueError(f"head_dim (16 or more) and block_size must be powers of two, got {dim} and {page}")
    check_tensors(rows, per_tile)


def check_tensors(rows: Rows, per_tile: dict[str, Tensor]) -> None:
    """What every kernel over the cache asks for, whatever a token's values mean."""
    q, blocks = rows.q, rows.blocks
    per_row = {"starts": rows.starts, "contexts": rows.contexts}
    if blocks.dtype not in CACHED or q.dtype not in CACHED[:3]:
        raise ValueError(f"no kernel for q {q.dtype} over keys {blocks.dtype}")
    for name, tensor in ({"tables": rows.tables} | per_row | per_tile).items():
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(f"{name} must be int32 in one dimension, got {tensor.dtype} {list(tensor.shape)}")
    for group, length in ((per_row, len(q)), (per_tile, len(next(iter(per_tile.values()), q)))):
        for name, tensor in group.items():
            if len(tensor) != length:
                raise ValueError(f"{name} must be [{length}], got {list(tensor.shape)}")
    if not all(tensor.is_contiguous() for tensor in (*rows, *per_tile.values())):
        raise ValueError("every tensor must be contiguous")
