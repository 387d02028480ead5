"""Rows in e4m3 with a scale a block of 128 columns, and back: for rows that come from elsewhere than this device's norm.

Legend of shapes: N rows, H hidden, B blocks of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK, blocks_of
from afd_ray.kernels.gpu.e4m3 import power_of_two, quantised
from afd_ray.kernels.gpu.norm_quantise import WARPS, WIDEST
from afd_ray.models.step3 import Narrow


@triton.jit(do_not_specialize_on_alignment=["exponents"])
def quantise_rows_kernel(
    rows,  # [N, H]
    values,  # [N, H] e4m3
    exponents,  # [N, B] uint8
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED_BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_column = column < WIDTH
    x = tl.load(rows + row * WIDTH + column, mask=is_column, other=0.0).to(tl.float32)
    value, exponent = quantised(x)
    tl.store(values + row * WIDTH + column, value, mask=is_column)
    tl.store(exponents + row * BLOCKS + block, exponent, mask=block < BLOCKS)


def quantise_rows(rows: Tensor, into: Narrow | None = None) -> Narrow:
    """What `handoff.quantise` gives: rows [N, H] to e4m3 [N, H] and exponents [N, B] uint8, as `room` gives them.

    float32, bfloat16 or float16, contiguous, H at most 16384. Raises ValueError for any other shape or dtype.
    """
    if rows.dim() != 2 or not 1 <= rows.shape[1] <= WIDEST or not rows.is_contiguous():
        raise ValueError(f"rows must be [N, H], contiguous, H from 1 to {WIDEST}, got {list(rows.shape)}")
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"no kernel for rows {rows.dtype}")
    count, width = rows.shape
    narrow = room(count, width, rows.device) if into is None else into
    if count:
        quantise_rows_kernel[(count,)](rows, *narrow, **_sizes(width), num_warps=WARPS)
    return narrow


def room(count: int, width: int, device: torch.device) -> Narrow:
    """Of that many rows, to be written."""
    values = torch.empty(count, width, dtype=torch.float8_e4m3fn, device=device)
    return Narrow(values, torch.empty(count, blocks_of(width), dtype=torch.uint8, device=device))


@triton.jit
def dequantise_rows_kernel(
    values,  # [N, H] e4m3
    exponents,  # [N, B] uint8
    rows,  # [N, H]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED_BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_column = column < WIDTH
    scale = power_of_two(tl.load(exponents + row * BLOCKS + block, mask=block < BLOCKS, other=1).to(tl.int32))
    x = tl.load(values + row * WIDTH + column, mask=is_column, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(rows + row * WIDTH + column, x.to(rows.dtype.element_ty), mask=is_column)


def dequantise_rows(narrow: Narrow, dtype: torch.dtype) -> Tensor:
    """What `handoff.dequantise` gives: [N, H] of `dtype`, contiguous values and exponents as `quantise_rows` gives them."""
    count, width = narrow.values.shape
    rows = narrow.values.new_empty(count, width, dtype=dtype)
    if count:
        dequantise_rows_kernel[(count,)](*narrow, rows, **_sizes(width), num_warps=WARPS)
    return rows


def _sizes(width: int) -> dict[str, int]:
    blocks = blocks_of(width)
    return {"WIDTH": width, "BLOCK": BLOCK, "BLOCKS": blocks, "PADDED_BLOCKS": triton.next_power_of_2(blocks)}
