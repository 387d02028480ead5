"""The experts of a layer: two grouped products over rows sorted by expert, SwiGLU in the first, weights and the sum in the second.

A single expert that takes every row, as a shared one or a dense layer is, needs neither an order nor weights.

Programs go through the rows' tiles first and through the columns next, so that the tiles of one expert read its weights together, and what
many experts add to the same columns of a row is added while these are in the L2 cache. The partial rows themselves are never written.

Legend of shapes: N rows, K top-k, E experts held, H hidden, I intermediate; a block is 128 columns, B blocks of H, J of I.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK
from afd_ray.kernels.gpu.e4m3 import power_of_two, scale_exponent, to_e4m3
from afd_ray.kernels.gpu.expert_order import Order, order_by_expert


class Experts(NamedTuple):
    """Stacked weights, contiguous; in e4m3 each 128 x 128 block times its scale."""

    gate: Tensor  # [E, I, H]
    up: Tensor  # [E, I, H]
    down: Tensor  # [E, H, I]
    gate_scales: Tensor | None = None  # [E, J, B] float32
    up_scales: Tensor | None = None  # [E, J, B]
    down_scales: Tensor | None = None  # [E, B, J]


class Tile(NamedTuple):
    """How a program goes through a product."""

    rows: int
    columns: int
    depth: int
    stages: int
    """Tiles of both operands on their way at a time."""
    warps: int


WIDE = 128
"""Columns of a tile: in e4m3 those that share a scale."""
GATE_UP_TILES = {
    torch.float32: Tile(64, WIDE, 32, 2, 8),
    torch.float16: Tile(64, WIDE, 64, 4, 8),
    torch.bfloat16: Tile(64, WIDE, 64, 4, 8),
    torch.float8_e4m3fn: Tile(64, WIDE, BLOCK, 4, 8),
}
DOWN_TILES = {
    torch.float32: Tile(64, WIDE, 32, 2, 4),
    torch.float16: Tile(64, WIDE, 64, 4, 4),
    torch.bfloat16: Tile(64, WIDE, 64, 4, 4),
    torch.float8_e4m3fn: Tile(64, WIDE, BLOCK, 4, 4),
}
"""By the dtype of weights and rows; found by compiling (docs/gpu.md)."""


@triton.jit(do_not_specialize=["rows"])
def gate_up_kernel(
    x,  # [N, H]
    exponents,  # [N, B] uint8, or None
    gate,
    up,  # [E, I, H]
    gate_scales,
    up_scales,  # [E, J, B], or None
    starts,  # or None: one expert takes every row
    assignments,
    inner,  # [N * K, I], sorted
    inner_exponents,  # [N * K, J], or None
    rows,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    expert, first, end = _expert_of(starts, rows, EXPERTS, PADDED_EXPERTS, TILE_ROWS)
    if expert >= EXPERTS:
        return
    place = first + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    row = tl.minimum(place, end - 1)
    if assignments is not None:
        row = tl.load(assignments + row) // TOP_K
    gates, ups = _products(x, exponents, row, gate, gate_scales, up, up_scales, expert, column, INNER, HIDDEN, TILE_DEPTH, NARROW)

    gated = gates * tl.sigmoid(gates) * ups
    is_row = place < end
    is_place = is_row[:, None] & (column < INNER)[None, :]
    at = inner + place.to(tl.int64)[:, None] * INNER + column[None, :]
    if NARROW:
        exponent = scale_exponent(tl.max(tl.abs(gated), 1))
        tl.store(inner_exponents + place * tl.num_programs(1) + tl.program_id(1), exponent.to(tl.uint8), mask=is_row)
        tl.store(at, to_e4m3(gated * power_of_two(254 - exponent)[:, None]), mask=is_place)
    else:
        tl.store(at, gated.to(inner.dtype.element_ty), mask=is_place)


@triton.jit(do_not_specialize=["rows"])
def down_kernel(
    inner,  # [N * K, I], sorted
    inner_exponents,  # [N * K, J], or None
    down,  # [E, H, I]
    down_scales,  # [E, B, J], or None
    starts,
    assignments,
    weights,  # [N, K], or None
    total,  # [N, H] float32
    rows,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    expert, first, end = _expert_of(starts, rows, EXPERTS, PADDED_EXPERTS, TILE_ROWS)
    if expert >= EXPERTS:
        return
    place = first + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    held = tl.minimum(place, end - 1)
    sums, _ = _products(
        inner, inner_exponents, held, down, down_scales, None, None, expert, column, HIDDEN, INNER, TILE_DEPTH, NARROW
    )

    row = held
    if assignments is not None:
        assignment = tl.load(assignments + held)
        row = assignment // TOP_K
        sums *= tl.load(weights + assignment).to(tl.float32)[:, None]
    at = total + row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.atomic_add(at, sums, mask=(place < end)[:, None] & (column < HIDDEN)[None, :], sem="relaxed")


@triton.jit
def _products(
    x,  # [., DEPTH]
    exponents,  # [., DEPTH / TILE_DEPTH] uint8, or None
    row,  # [M], all of them rows of x
    one,  # [E, COLUMNS, DEPTH]
    one_scales,  # [E, column tiles, DEPTH / TILE_DEPTH], or None
    two,  # as one, or None
    two_scales,
    expert,
    column,  # [C]
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Rows [M, DEPTH] by the expert's columns of `one`, and of `two`: both [M, C]; the second is zeros without `two`."""
    is_column = (column < COLUMNS)[:, None]
    depth = tl.arange(0, TILE_DEPTH)[None, :]
    rows = x + row.to(tl.int64)[:, None] * DEPTH + depth
    weight = (expert.to(tl.int64) * COLUMNS + column)[:, None] * DEPTH + depth
    ones = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    twos = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    BLOCKS: tl.constexpr = DEPTH // TILE_DEPTH
    if NARROW:
        row_scale = exponents + row.to(tl.int64) * BLOCKS
        weight_scale = (expert * tl.num_programs(1) + tl.program_id(1)) * BLOCKS
        exponent, one_scale = tl.load(row_scale), tl.load(one_scales + weight_scale)
        if two is not None:
            two_scale = tl.load(two_scales + weight_scale)
    for block in range(BLOCKS):
        at = block * TILE_DEPTH
        left = tl.load(rows + at)
        one_tile = tl.load(one + weight + at, mask=is_column, other=0.0)
        if two is not None:
            two_tile = tl.load(two + weight + at, mask=is_column, other=0.0)
        if NARROW:
            # A block ahead: no product waits for its scales.
            ahead = tl.minimum(block + 1, BLOCKS - 1)
            scale = power_of_two(exponent.to(tl.int32))
            by_one = (scale * one_scale)[:, None]
            exponent, one_scale = tl.load(row_scale + ahead), tl.load(one_scales + weight_scale + ahead)
            ones += tl.dot(left, one_tile.T) * by_one
            if two is not None:
                by_two = (scale * two_scale)[:, None]
                two_scale = tl.load(two_scales + weight_scale + ahead)
                twos += tl.dot(left, two_tile.T) * by_two
        else:
            ones = tl.dot(left, one_tile.T, ones, input_precision="ieee")
            if two is not None:
                twos = tl.dot(left, two_tile.T, twos, input_precision="ieee")
    return ones, twos


@triton.jit
def _expert_of(starts, rows, EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Whose rows the program's tile has, and the first of them and where the expert's end; PADDED_EXPERTS when no tile is left."""
    if starts is None:
        return tl.program_id(0) * 0, tl.program_id(0) * TILE_ROWS, rows
    else:
        each = tl.arange(0, PADDED_EXPERTS)
        first = tl.load(starts + each, mask=each < EXPERTS, other=0)
        end = tl.load(starts + each + 1, mask=each < EXPERTS, other=0)
        tiles = tl.cdiv(end - first, TILE_ROWS)
        expert = tl.sum((tl.cumsum(tiles, 0) <= tl.program_id(0)).to(tl.int32), 0)
        before = tl.sum(tl.where(each < expert, tiles, 0), 0)
        own_first = tl.sum(tl.where(each == expert, first, 0), 0)
        own_end = tl.sum(tl.where(each == expert, end, 0), 0)
        return expert, own_first + (tl.program_id(0) - before) * TILE_ROWS, own_end


def feed_forward(
    experts: Experts,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    first_id: int = 0,
    exponents: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """x [N, H] through the experts first_id.. that its rows chose, ids [N, K] of any integer dtype, times weights [N, K]: [N, H] float32.

    Ids held elsewhere add nothing. x in the dtype of the weights: float32, float16 or bfloat16, H and I multiples of 64; or e4m3 with
    `exponents` [N, B] as `handoff.quantise` gives them, H and I multiples of 128: what SwiGLU gives is then e4m3 too, by the same rule.
    Sums are float32, added to `total` if that is given; a row's experts are added in no fixed order.
    Raises ValueError for any other shape or dtype.
    """
    total = _into(experts, x, exponents, total)
    _check_rows(x, ids, weights)
    if ids.numel():
        _feed(experts, x, exponents, order_by_expert(ids, len(experts.gate), first_id), weights, total)
    return total


def feed_every_row(experts: Experts, x: Tensor, *, exponents: Tensor | None = None, total: Tensor | None = None) -> Tensor:
    """As `feed_forward`, of one expert [1, I, H] that takes every row as it is."""
    if len(experts.gate) != 1:
        raise ValueError(f"one expert takes every row, got {len(experts.gate)}")
    total = _into(experts, x, exponents, total)
    if len(x):
        _feed(experts, x, exponents, None, None, total)
    return total


def _into(experts: Experts, x: Tensor, exponents: Tensor | None, total: Tensor | None) -> Tensor:
    _check(experts, x, exponents)
    if total is None:
        return x.new_zeros(*x.shape, dtype=torch.float32)
    if total.dtype != torch.float32 or total.shape != x.shape or not total.is_contiguous():
        raise ValueError(f"total must be float32 {list(x.shape)}, contiguous, got {total.dtype} {list(total.shape)}")
    return total


def _feed(
    experts: Experts, x: Tensor, exponents: Tensor | None, order: Order | None, weights: Tensor | None, total: Tensor
) -> None:
    """Add what each assignment's expert gives, times its weight, to its row of `total` [N, H]; without an order each row once."""
    _, width, hidden = experts.gate.shape
    rows = len(x)
    count, top_k = (rows, 1) if order is None or weights is None else (len(order.assignments), weights.shape[1])
    inner = x.new_empty(count, width)
    inner_exponents = None if exponents is None else exponents.new_empty(count, triton.cdiv(width, BLOCK))
    sorted_ = (None, None) if order is None else order
    tile = GATE_UP_TILES[x.dtype]
    gate_up_kernel[_grid(experts, count, order is None, tile, width)](
        x,
        exponents,
        experts.gate,
        experts.up,
        experts.gate_scales,
        experts.up_scales,
        *sorted_,
        inner,
        inner_exponents,
        rows,
        **_sizes(experts, tile, top_k),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    tile = DOWN_TILES[inner.dtype]
    down_kernel[_grid(experts, count, order is None, tile, hidden)](
        inner,
        inner_exponents,
        experts.down,
        experts.down_scales,
        *sorted_,
        weights,
        total,
        rows,
        **_sizes(experts, tile, top_k),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _grid(experts: Experts, count: int, is_dense: bool, tile: Tile, columns: int) -> tuple[int, int]:
    """Row tiles, as many as there can be whichever experts were chosen, and column tiles."""
    tiles = triton.cdiv(count, tile.rows) if is_dense else min(count, count // tile.rows + len(experts.gate))
    return tiles, triton.cdiv(columns, tile.columns)


def _sizes(experts: Experts, tile: Tile, top_k: int) -> dict[str, int | bool]:
    count, inner, hidden = experts.gate.shape
    sizes = {"HIDDEN": hidden, "INNER": inner, "EXPERTS": count, "PADDED_EXPERTS": triton.next_power_of_2(count), "TOP_K": top_k}
    tiles = {"TILE_ROWS": tile.rows, "TILE_COLUMNS": tile.columns, "TILE_DEPTH": tile.depth}
    return sizes | tiles | {"NARROW": experts.gate.dtype == torch.float8_e4m3fn}


def _check_rows(x: Tensor, ids: Tensor, weights: Tensor) -> None:
    if ids.dim() != 2 or len(ids) != len(x) or weights.shape != ids.shape:
        raise ValueError(f"ids and weights must be [{len(x)}, K], got {list(ids.shape)}, {list(weights.shape)}")
    if not (ids.is_contiguous() and weights.is_contiguous()):
        raise ValueError("every tensor must be contiguous")


def _check(experts: Experts, x: Tensor, exponents: Tensor | None) -> None:
    gate, up, down = experts[:3]
    if gate.dim() != 3 or up.shape != gate.shape or down.shape != (gate.shape[0], gate.shape[2], gate.shape[1]):
        raise ValueError(
            f"gate and up must be [E, I, H] and down [E, H, I], got {list(gate.shape)}, {list(up.shape)}, {list(down.shape)}"
        )
    if x.dim() != 2 or x.shape[1] != gate.shape[2]:
        raise ValueError(f"x must be [N, {gate.shape[2]}], got {list(x.shape)}")
    if x.dtype not in GATE_UP_TILES or not x.dtype == gate.dtype == up.dtype == down.dtype:
        raise ValueError(f"no kernel for rows {x.dtype}, gate {gate.dtype}, up {up.dtype}, down {down.dtype}")
    if not all(tensor.is_contiguous() for tensor in (x, gate, up, down)):
        raise ValueError("every tensor must be contiguous")
    _check_scales(experts, x, exponents)


def _check_scales(experts: Experts, x: Tensor, exponents: Tensor | None) -> None:
    count, inner, hidden = experts.gate.shape
    scales = {"exponents": exponents} | {name: getattr(experts, name) for name in ("gate_scales", "up_scales", "down_scales")}
    if x.dtype != torch.float8_e4m3fn:
        if inner % 64 or hidden % 64:
            raise ValueError(f"H and I must be multiples of 64, got {hidden} and {inner}")
        given = [name for name, tensor in scales.items() if tensor is not None]
        if given:
            raise ValueError(f"only e4m3 has scales, got {', '.join(given)} for {x.dtype}")
        return
    if inner % BLOCK or hidden % BLOCK:
        raise ValueError(f"H and I must be multiples of {BLOCK} in e4m3, got {hidden} and {inner}")
    across, along = hidden // BLOCK, inner // BLOCK
    wide, narrow = (torch.float32, [count, along, across]), (torch.float32, [count, across, along])
    expected = {"exponents": (torch.uint8, [len(x), across]), "gate_scales": wide, "up_scales": wide, "down_scales": narrow}
    for name, (dtype, shape) in expected.items():
        tensor = scales[name]
        if tensor is None or tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {dtype} {shape}, contiguous")
