"""The sum of the residual and what came back from the FFN ranks, its RMSNorm, and that in e4m3 as the wire and FP8 products want it, in one pass.

Legend of shapes: N rows, H hidden, U updates (one an FFN instance, and the shared expert's), R partial rows,
B blocks of a row, S splits of a product.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK, blocks_of
from afd_ray.kernels.gpu.e4m3 import power_of_two, scale_exponent, to_e4m3
from afd_ray.kernels.gpu.linear import Parts, summed

WIDEST = 16384
"""Values of a row that one program holds in registers."""
WARPS = 8


class Normalised(NamedTuple):
    """What `add_norm_quantise` gives."""

    residual: Tensor  # [N, H]; `hidden` where there was none
    hidden: Tensor  # [N, H]
    values: Tensor | None  # [N, H] e4m3
    exponents: Tensor | None  # [N, B] uint8, or [N, 1] with one scale a row


@triton.jit(do_not_specialize=["rows", "splits", "split_stride", "row_stride"])
def add_norm_quantise_kernel(
    residual,  # [N, H], or None
    product,  # [S, N, H] float32, or None
    updates,  # [U, N, H]; with places [R, H]
    places,  # [U, N] int32, or None
    weight,  # [H]
    new_residual,  # [N, H]
    hidden,  # [N, H]
    values,  # [N, H] e4m3, or None
    exponents,  # [N, B] or [N, 1] uint8, or None
    rows,
    splits,
    split_stride,  # of the product
    row_stride,
    epsilon,
    UPDATES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    SCALES: tl.constexpr,  # of a row: 0, 1 or one a block
):
    row = tl.program_id(0)
    dtype = hidden.dtype.element_ty
    block = tl.arange(0, PADDED_BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_column = column < WIDTH
    place = row.to(tl.int64) * WIDTH + column

    if product is not None:
        x = summed(product, row.to(tl.int64) * row_stride + column, is_column, splits, split_stride).to(dtype)
    if residual is not None:
        held = tl.load(residual + place, mask=is_column, other=0.0)
        x = held if product is None else (held.to(tl.float32) + x.to(tl.float32)).to(dtype)
    for update in tl.static_range(UPDATES):
        partial = update * rows + row if places is None else tl.load(places + update * rows + row)
        is_added = is_column & (partial >= 0)
        added = tl.load(updates + partial.to(tl.int64) * WIDTH + column, mask=is_added, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(dtype)
    if new_residual is not None:
        tl.store(new_residual + place, x, mask=is_column)

    # Rounded where the model's own norm rounds.
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x) / WIDTH + epsilon)
    gain = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    normalised = (x.to(dtype).to(tl.float32) * gain).to(dtype)
    tl.store(hidden + place, normalised, mask=is_column)

    if SCALES > 0:
        x = normalised.to(tl.float32)
        peak = tl.max(tl.abs(x), 1)
        if SCALES == 1:
            peak = tl.max(peak, 0)
        exponent = scale_exponent(peak)
        inverse = power_of_two(254 - exponent)
        scaled = x * inverse if SCALES == 1 else x * inverse[:, None]
        tl.store(values + place, to_e4m3(scaled), mask=is_column)
        if SCALES == 1:
            tl.store(exponents + row, exponent.to(tl.uint8))
        else:
            tl.store(exponents + row * SCALES + block, exponent.to(tl.uint8), mask=block < SCALES)


def add_norm_quantise(
    residual: Tensor | None,
    updates: Tensor | None,
    weight: Tensor,
    epsilon: float,
    *,
    product: Parts | None = None,
    places: Tensor | None = None,
    scales: str | None = "block",
) -> Normalised:
    """residual [N, H] and updates [U, N, H], or None, to their sum, that normalised times weight [H], and the latter in e4m3.

    A `product` [S, N, H] is added up, rounded and added to the residual before the updates, or stands for the residual where that is None.
    With `places` [U, N] int32 updates are partial rows [R, H] as they came, of any rank and in any order: update u of row n is
    updates[places[u, n]], and none where that is -1.
    The sum is rounded after each update, the norm as `step3.rms_norm` does it, and the values as `handoff.quantise` makes them:
    with a scale for each block of 128 columns ("block"), or by the same rule one for the row ("row"); None leaves e4m3 out.
    All but the product of one dtype, float32, bfloat16 or float16, and contiguous; H at most 16384. Raises ValueError for any other shape or
    dtype. A residual that nothing is added to is given back as it is.
    """
    _check(residual, updates, product, places, weight, scales)
    rows, width = _shape(residual, product)
    count = 0 if updates is None else len(updates if places is None else places)
    blocks = blocks_of(width)
    exponents = {None: 0, "row": 1, "block": blocks}[scales]
    hidden = weight.new_empty(rows, width)
    summed_up = torch.empty_like(residual) if residual is not None and (count or product is not None) else None
    values = torch.empty_like(hidden, dtype=torch.float8_e4m3fn) if exponents else None
    bytes_ = hidden.new_empty(rows, exponents, dtype=torch.uint8) if exponents else None
    parts = (1, 0, 0) if product is None else (len(product.sums), *product.sums.stride()[:2])
    if rows:
        sizes = {"UPDATES": count, "WIDTH": width, "BLOCK": BLOCK, "SCALES": exponents}
        add_norm_quantise_kernel[(rows,)](
            residual,
            None if product is None else product.sums,
            updates,
            places,
            weight,
            summed_up,
            hidden,
            values,
            bytes_,
            rows,
            *parts,
            epsilon,
            PADDED_BLOCKS=triton.next_power_of_2(blocks),
            **sizes,
            num_warps=WARPS,
        )
    given_back = hidden if residual is None else residual
    return Normalised(given_back if summed_up is None else summed_up, hidden, values, bytes_)


def _shape(residual: Tensor | None, product: Parts | None) -> tuple[int, int]:
    rows, width = (residual if product is None else product.sums[0]).shape  # type: ignore[union-attr]
    return rows, width


def _check(
    residual: Tensor | None,
    updates: Tensor | None,
    product: Parts | None,
    places: Tensor | None,
    weight: Tensor,
    scales: str | None,
) -> None:
    if product is not None:
        _check_product(residual, product, weight)
    elif residual is None:
        raise ValueError("a residual or a product is needed")
    if (residual is not None and (residual.dim() != 2 or weight.shape != residual.shape[1:])) or not 1 <= len(weight) <= WIDEST:
        shape = None if residual is None else list(residual.shape)
        raise ValueError(f"residual must be [N, H] and weight [H], H from 1 to {WIDEST}, got {shape} and {list(weight.shape)}")
    if updates is not None:
        _check_updates(_shape(residual, product), updates, places)
    elif places is not None:
        raise ValueError("places are given without updates")
    tensors = [tensor for tensor in (residual, weight, updates) if tensor is not None]
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"no kernel for {', '.join(str(tensor.dtype) for tensor in tensors)}")
    if not all(tensor.is_contiguous() for tensor in tensors) or not (places is None or places.is_contiguous()):
        raise ValueError("every tensor must be contiguous")
    if scales not in ("block", "row", None):
        raise ValueError(f"scales must be block, row or None, got {scales}")


def _check_product(residual: Tensor | None, product: Parts, weight: Tensor) -> None:
    sums = product.sums
    if sums.dtype != torch.float32 or sums.dim() != 3 or sums.shape[2] != len(weight) or sums.stride(2) != 1:
        raise ValueError(f"a product must be float32 [S, N, {len(weight)}], got {sums.dtype} {list(sums.shape)}")
    if residual is not None and residual.shape != sums.shape[1:]:
        raise ValueError(f"a product must be [S, *{list(residual.shape)}], got {list(sums.shape)}")


def _check_updates(shape: tuple[int, int], updates: Tensor, places: Tensor | None) -> None:
    rows, width = shape
    if places is None:
        if updates.dim() != 3 or updates.shape[1:] != shape:
            raise ValueError(f"updates must be [U, {rows}, {width}], got {list(updates.shape)}")
    elif updates.dim() != 2 or updates.shape[1] != width or places.dim() != 2 or places.shape[1] != rows:
        raise ValueError(
            f"updates must be [R, {width}] and places [U, {rows}], got {list(updates.shape)} and {list(places.shape)}"
        )
    elif places.dtype != torch.int32:
        raise ValueError(f"places must be int32, got {places.dtype}")
