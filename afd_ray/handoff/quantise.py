"""Rows in 8 bits: e4m3 values with one scale for each row and block of columns, as DeepSeek-V3 and DeepGEMM lay them out."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Columns that share a scale; the last block of a row may be narrower."""
LARGEST = 448.0
"""The largest e4m3 value."""

_BIAS = 127
_MANTISSA_BITS = 23
_SMALLEST = 1
"""Of the exponent bytes: 2^-126, so that a scale and its reciprocal are both normal float32 numbers."""
_JUST_ABOVE_LARGEST = 0x600001
"""Mantissa bits of the smallest float32 above 1.75; LARGEST is 1.75 x 2^8."""
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""Every e4m3 number by its code: a lookup is several times as fast as torch's cast."""


def blocks_of(columns: int) -> int:
    return -(-columns // BLOCK)


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, H] to e4m3 values [N, H] and the exponents [N, ceil(H / 128)] uint8 of their scales.

    Byte e stands for the scale 2^(e - 127) (UE8M0): the smallest power of two, from 2^-126 on, that brings the block within 448.
    Rounds to nearest, ties to even; the same on every host. What is not finite stays so, and its block keeps only its largest other
    values; numbers above 1.9 x 2^127 may round to infinity. The tests hold it to a loop over single elements.
    """
    count, columns = rows.shape
    blocks = blocks_of(columns)
    padded = _padded(rows.float(), blocks).view(count, blocks, BLOCK)
    peak_bits = padded.abs().amax(dim=-1).view(torch.int32)
    # A peak's exponent, and one more above 1.75 times its power of two; less LARGEST's exponent.
    exponents = ((peak_bits - _JUST_ABOVE_LARGEST) >> _MANTISSA_BITS).sub_(7).clamp_(min=_SMALLEST)
    inverse_scales = _power_of_two(2 * _BIAS - exponents)
    values = (padded * inverse_scales[..., None]).to(torch.float8_e4m3fn)
    return values.view(count, blocks * BLOCK)[:, :columns], exponents.to(torch.uint8)


def dequantise(values: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` gave back into rows [N, H] of `dtype`."""
    count, columns = values.shape
    blocks = exponents.shape[1]
    codes = _padded(values.view(torch.uint8), blocks).int()
    rows = _VALUES.index_select(0, codes.view(-1)).view(count, blocks, BLOCK)
    rows *= _power_of_two(exponents.int())[..., None]
    return rows.view(count, blocks * BLOCK)[:, :columns].to(dtype)


def _padded(rows: Tensor, blocks: int) -> Tensor:
    """With zeros up to the end of the last block."""
    missing = blocks * BLOCK - rows.shape[1]
    return F.pad(rows, (0, missing)) if missing else rows


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^(e - 127) in float32 of int32 exponents from 1 to 254."""
    return (exponents << _MANTISSA_BITS).view(torch.float32)
