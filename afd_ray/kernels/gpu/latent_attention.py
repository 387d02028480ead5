"""Decode attention over latents (MLA, arXiv:2405.04434 section 2.1): the kernel of `decode_attention`, where a token's key is its value too.

A token's key is its latent followed by the rotary part that all heads share; its value is the latent, so it is read once. Queries come
multiplied by the keys' up-projection and what is given is multiplied by the values' afterwards: no head has keys of its own.

Legend of shapes: N rows, A query heads, L latent, R rotary, P blocks of the cache.
"""

import torch
from torch import Tensor

from afd_ray.kernels.gpu.decode_attention import attend_in_splits
from afd_ray.kernels.gpu.paged_softmax import Rows, Tile, check_tensors, operand

TILES = {
    torch.bfloat16: Tile(queries=64, tokens=32, stages=4, warps=8),
    torch.float16: Tile(queries=64, tokens=32, stages=4, warps=8),
    torch.float8_e4m3fn: Tile(queries=64, tokens=64, stages=3, warps=8),
    torch.float32: Tile(queries=16, tokens=16, stages=2, warps=4),
}
"""By the cache's dtype; found by compiling for 512 + 64 (docs/gpu.md). 128 heads take two programs, neighbours, which read the same tokens."""


def attend_latents(rows: Rows, rotary: int, *, scale: float, splits: int, cache_scale: float = 1.0) -> Tensor:
    """q [N, A, L + R] over latents and rotary keys [P, block_size, L + R]: [N, A, L] in the dtype of q.

    `scale` of the softmax is of a head before its up-projection is multiplied in: (128 + 64)^-0.5 for DeepSeek-V3, times what its longer
    context asks for. L (16 or more), R = `rotary` (16 or more) and block_size are powers of two. Dtypes, `splits`, rows of no context and what
    raises ValueError: as `decode_attention.attend` has them; e4m3 has one `cache_scale`, its numbers being keys and values, and wants q in
    float16: what has to be converted first is held in registers, of which there are none left.
    """
    latent = _check(rows, rotary)
    sizes = {"HEADS": rows.q.shape[1], "KEY_HEADS": 1, "DIM": latent, "ROTARY": rotary, "PAGE": rows.blocks.shape[1]}
    constants = sizes | {"OPERAND": operand(rows.blocks.dtype)}
    return attend_in_splits(rows, TILES[rows.blocks.dtype], splits, scale * cache_scale, cache_scale, constants)


def _check(rows: Rows, rotary: int) -> int:
    """L; raises ValueError."""
    q, blocks = rows.q, rows.blocks
    if q.dim() != 3 or blocks.dim() != 3 or blocks.shape[2] != q.shape[2]:
        raise ValueError(
            f"q must be [N, A, L + R] and blocks [P, block_size, L + R], got {list(q.shape)} and {list(blocks.shape)}"
        )
    latent, page = q.shape[2] - rotary, blocks.shape[1]
    if min(latent, rotary) < 16 or latent & latent - 1 or rotary & rotary - 1 or page & page - 1:
        raise ValueError(f"latent, rotary (16 or more) and block_size must be powers of two, got {latent}, {rotary} and {page}")
    check_tensors(rows, {})
    return latent
