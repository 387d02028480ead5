"""Products of rows in e4m3 by a weight in e4m3, for few rows: the weight's bytes set the time.

A weight of few columns is cut along its inputs too, so that every multiprocessor reads a part of it. The parts of a product are float32 and are
added up, in their order, by whatever kernel takes them.

Legend of shapes: N rows, O outputs, X inputs, B blocks of 128 inputs, S splits of the inputs.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK
from afd_ray.kernels.gpu.e4m3 import power_of_two
from afd_ray.models.step3 import Narrow

TILE_ROWS, STAGES, WARPS = 64, 5, 4
"""Rows of one wgmma; tiles of rows and weights on their way at a time (docs/gpu.md)."""
HALF_BLOCK = 64
"""Outputs of a tile where a weight has scales for so many."""
MOST_SPLITS = 8
SHORTEST_SPLIT = 4
"""Blocks."""
BUSY = 0.75
"""Share of the multiprocessors that read about as fast as all of them."""


class ScaledWeight(NamedTuple):
    """A weight, or several side by side, in e4m3."""

    values: Tensor  # [O, X]
    scales: Tensor  # [O / tile, B] float32
    tile: int
    """Outputs that share a scale: 128 or 64."""


class Parts(NamedTuple):
    """Columns of a product in parts that are still to be added up."""

    sums: Tensor  # [S, N, .] float32, of any strides but for the last

    def columns(self, first: int, count: int) -> "Parts":
        return Parts(self.sums[:, :, first : first + count])

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """[N, .]; added up in the order in which kernels do it."""
        total: Tensor = functools.reduce(torch.add, self.sums)
        return total.to(dtype)


@triton.jit(do_not_specialize=["rows", "span"])
def linear_kernel(
    x,  # [N, X] e4m3
    exponents,  # [N, B] uint8
    weight,  # [O, X] e4m3
    scales,  # [O / TILE_COLUMNS, B] float32
    out,  # [S, N, O]
    rows,
    span,  # blocks of a split
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    held = tl.minimum(row, rows - 1).to(tl.int64)
    depth = tl.arange(0, BLOCK)[None, :]
    left_at = x + held[:, None] * (BLOCKS * BLOCK) + depth
    weight_at = weight + column.to(tl.int64)[:, None] * (BLOCKS * BLOCK) + depth
    exponent_at, scale_at = exponents + held * BLOCKS, scales + tl.program_id(1) * BLOCKS

    first = tl.program_id(2) * span
    end = tl.minimum(first + span, BLOCKS)
    start = tl.minimum(first, BLOCKS - 1)
    exponent, scale = tl.load(exponent_at + start), tl.load(scale_at + start)
    sums = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for block in range(first, end):
        left = tl.load(left_at + block * BLOCK)
        right = tl.load(weight_at + block * BLOCK)
        by = (power_of_two(exponent.to(tl.int32)) * scale)[:, None]
        # A block ahead: no product waits for its scales.
        ahead = tl.minimum(block + 1, BLOCKS - 1)
        exponent, scale = tl.load(exponent_at + ahead), tl.load(scale_at + ahead)
        sums += tl.dot(left, right.T) * by
    at = (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * OUTPUTS + column[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit
def summed(parts, at, mask, splits, split_stride):
    """float32 sum over the splits of what lies at `at` of each."""
    place = parts + at
    total = tl.load(place, mask=mask, other=0.0)
    for _ in range(1, splits):
        place += split_stride
        total += tl.load(place, mask=mask, other=0.0)
    return total


def product(x: Narrow, weight: ScaledWeight) -> Parts:
    """x [N, X] by the weight's rows, [S, N, O]; splits depend on numbers of rows and on the weight's shape alone.

    X is a multiple of 128, O of the weight's tile, everything contiguous. Raises ValueError for any other shape or dtype.
    """
    tiles = triton.cdiv(len(x.values), TILE_ROWS) * (len(weight.values) // weight.tile)
    splits = splits_for(tiles, weight.scales.shape[1], multiprocessors(x.values.device))
    return Parts(_launch(x, weight, splits, torch.float32))


def rounded_product(x: Narrow, weight: ScaledWeight, dtype: torch.dtype) -> Tensor:
    """As `product`, [N, O] of float32, float16 or bfloat16: for weights with so many outputs that none need be split."""
    return _launch(x, weight, 1, dtype)[0]


def _launch(x: Narrow, weight: ScaledWeight, splits: int, dtype: torch.dtype) -> Tensor:
    _check(x, weight)
    (rows, _), (outputs, blocks) = x.values.shape, (len(weight.values), weight.scales.shape[1])
    out = x.values.new_empty(splits, rows, outputs, dtype=dtype)
    if rows:
        linear_kernel[(triton.cdiv(rows, TILE_ROWS), outputs // weight.tile, splits)](
            *x,
            weight.values,
            weight.scales,
            out,
            rows,
            triton.cdiv(blocks, splits),
            OUTPUTS=outputs,
            BLOCKS=blocks,
            BLOCK=BLOCK,
            TILE_ROWS=TILE_ROWS,
            TILE_COLUMNS=weight.tile,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out


def joined(weights: Sequence[tuple[Tensor, Tensor]]) -> ScaledWeight:
    """Weights with the same inputs, each e4m3 [O, X] and scales [ceil(O / 128), B], as one whose outputs lie side by side.

    Raises ValueError where O is no multiple of 64.
    """
    tile = BLOCK if all(len(values) % BLOCK == 0 for values, _ in weights) else HALF_BLOCK
    if any(len(values) % tile for values, _ in weights):
        raise ValueError(f"outputs must be multiples of {HALF_BLOCK}, got {', '.join(str(len(values)) for values, _ in weights)}")
    scales = [each.repeat_interleave(BLOCK // tile, 0)[: len(values) // tile] for values, each in weights]
    together = torch.cat([values.view(torch.uint8) for values, _ in weights]).view(torch.float8_e4m3fn)
    return ScaledWeight(together, torch.cat(scales), tile)


def splits_for(tiles: int, blocks: int, multiprocessors: int) -> int:
    """Into how many splits the blocks of inputs go: the fewest that keep the multiprocessors busy.

    >>> splits_for(56, 128, 132), splits_for(20, 56, 132), splits_for(128, 16, 132)
    (2, 5, 1)
    """
    most = max(1, min(MOST_SPLITS, blocks // SHORTEST_SPLIT))
    return next((splits for splits in range(1, most) if tiles * splits >= BUSY * multiprocessors), most)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """One where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(x: Narrow, weight: ScaledWeight) -> None:
    rows, inputs = x.values.shape
    if inputs % BLOCK or weight.values.shape[1] != inputs or len(weight.values) % weight.tile:
        raise ValueError(
            f"rows must be [N, X], X a multiple of {BLOCK}, and the weight [O, X], O a multiple of {weight.tile}, "
            f"got {list(x.values.shape)} and {list(weight.values.shape)}"
        )
    expected = {
        "values": (x.values, torch.float8_e4m3fn, [rows, inputs]),
        "exponents": (x.exponents, torch.uint8, [rows, inputs // BLOCK]),
        "weight": (weight.values, torch.float8_e4m3fn, list(weight.values.shape)),
        "scales": (weight.scales, torch.float32, [len(weight.values) // weight.tile, inputs // BLOCK]),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {dtype} {shape}, contiguous, got {tensor.dtype} {list(tensor.shape)}")
