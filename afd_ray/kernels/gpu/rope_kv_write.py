"""Rotary embedding of queries and keys, and keys and values into the paged cache, in one launch.

Legend of shapes: N rows, A query heads, D head_dim, T token slots of the cache, S splits of a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.kernels.gpu.linear import Parts, summed

HEADS_A_PROGRAM = 8


@triton.jit(do_not_specialize=["splits", "split_stride"])
def rotate_and_write_kernel(
    q,  # [N, A, D], rotated in place
    k,  # [N, D], rows k_stride apart; [S, N, D] float32 where SPLIT
    v,  # [N, D], rows v_stride apart; as k
    cos,  # [N, D / 2] float32
    sin,
    slots,  # [N]
    tokens,  # [T, 2, D]
    k_stride,
    v_stride,
    splits,
    split_stride,
    inverse_key_scale,
    inverse_value_scale,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    NARROW: tl.constexpr,  # whether the cache is e4m3
    SPLIT: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, HALF)
    c, s = tl.load(cos + row * HALF + half), tl.load(sin + row * HALF + half)
    if tile * TILE_HEADS < HEADS:
        head = tile * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
        place, is_head = q + (row * HEADS + head) * 2 * HALF + half[None, :], head < HEADS
        q_first = tl.load(place, mask=is_head, other=0.0).to(tl.float32)
        q_second = tl.load(place + HALF, mask=is_head, other=0.0).to(tl.float32)
        tl.store(place, (q_first * c - q_second * s).to(q.dtype.element_ty), mask=is_head)
        tl.store(place + HALF, (q_second * c + q_first * s).to(q.dtype.element_ty), mask=is_head)
    else:
        # The last program of a row: its key and value.
        key, value = row * k_stride + half, row * v_stride + half
        dtype = q.dtype.element_ty
        k_first = _read(k, key, splits, split_stride, dtype, SPLIT).to(tl.float32)
        k_second = _read(k, key + HALF, splits, split_stride, dtype, SPLIT).to(tl.float32)
        held = tokens + tl.load(slots + row).to(tl.int64) * 4 * HALF + half
        _write(held, (k_first * c - k_second * s).to(dtype), inverse_key_scale, NARROW)
        _write(held + HALF, (k_second * c + k_first * s).to(dtype), inverse_key_scale, NARROW)
        _write(held + 2 * HALF, _read(v, value, splits, split_stride, dtype, SPLIT), inverse_value_scale, NARROW)
        _write(held + 3 * HALF, _read(v, value + HALF, splits, split_stride, dtype, SPLIT), inverse_value_scale, NARROW)


@triton.jit
def _read(numbers, at, splits, split_stride, dtype: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT:
        return summed(numbers, at, at >= 0, splits, split_stride).to(dtype)
    else:
        return tl.load(numbers + at)


@triton.jit
def _write(place, numbers, inverse_scale, NARROW: tl.constexpr):
    if NARROW:
        numbers = tl.minimum(tl.maximum(numbers.to(tl.float32) * inverse_scale, -448.0), 448.0)
    tl.store(place, numbers.to(place.dtype.element_ty))


def rotate_and_write(
    q: Tensor,
    k: Tensor | Parts,
    v: Tensor | Parts,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    tokens: Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Rotate q [N, A, D] in place, and store rotated k and v [N, D] at token slots [N] of tokens [T, 2 * D].

    cos and sin [N, D / 2] float32 as `step3.rotary_table` gives them; slots int32 or int64. k and v may be columns of a wider product.
    As parts of a product k and v are added up, and rounded to the dtype of q.
    tokens in that dtype, `PagedCache.blocks[layer].flatten(0, 1)`, or e4m3: then divided by the scales and cut off at 448.
    D is a power of two. Raises ValueError for any other shape or dtype.
    """
    is_split = isinstance(k, Parts)
    splits, split_stride = (len(k.sums), k.sums.stride(0)) if isinstance(k, Parts) else (1, 0)
    k, v = (each.sums if isinstance(each, Parts) else each for each in (k, v))
    _check(q, k, v, is_split, cos, sin, slots, tokens)
    rows, heads, dim = q.shape
    if not rows:
        return
    tile_heads = min(HEADS_A_PROGRAM, triton.next_power_of_2(heads))
    rotate_and_write_kernel[(rows, triton.cdiv(heads, tile_heads) + 1)](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        tokens,
        k.stride(-2),
        v.stride(-2),
        splits,
        split_stride,
        1 / key_scale,
        1 / value_scale,
        HEADS=heads,
        HALF=dim // 2,
        TILE_HEADS=tile_heads,
        NARROW=tokens.dtype == torch.float8_e4m3fn,
        SPLIT=is_split,
        num_warps=4,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, is_split: bool, cos: Tensor, sin: Tensor, slots: Tensor, tokens: Tensor) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be [N, A, D], got {list(q.shape)}")
    rows, _, dim = q.shape
    if dim < 2 or dim & dim - 1:
        raise ValueError(f"head_dim must be a power of two, got {dim}")
    row = [*([len(k)] if is_split else []), rows, dim]
    expected = {"k": (k, row), "v": (v, row), "cos": (cos, [rows, dim // 2]), "sin": (sin, [rows, dim // 2])}
    expected |= {"slots": (slots, [rows]), "tokens": (tokens, [len(tokens), 2 * dim])}
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
    given = torch.float32 if is_split else q.dtype
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not given == k.dtype == v.dtype:
        raise ValueError(f"no kernel for q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if tokens.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"the cache must hold {q.dtype} or e4m3, got {tokens.dtype}")
    if not cos.dtype == sin.dtype == torch.float32 or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cos and sin must be float32 and slots integers, got {cos.dtype}, {sin.dtype}, {slots.dtype}")
    if not all(tensor.is_contiguous() for tensor in (q, cos, sin, slots, tokens)) or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError("every tensor must be contiguous, k and v in each row")
    if is_split and k.stride(0) != v.stride(0):
        raise ValueError("k and v must be columns of one product")
