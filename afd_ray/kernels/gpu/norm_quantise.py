"""The sum of the residual and what came back from the FFN ranks, its RMSNorm, and that in e4m3 as the wire and FP8 products want it, in one pass.

Legend of shapes: N rows, H hidden, U updates (one an FFN instance, and the shared expert's), R partial rows,
B blocks of a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK, blocks_of
from afd_ray.kernels.gpu.e4m3 import power_of_two, scale_exponent, to_e4m3

WIDEST = 16384
"""Values of a row that one program holds in registers."""
WARPS = 8


class Normalised(NamedTuple):
    """What `add_norm_quantise` gives."""

    residual: Tensor  # [N, H]
    hidden: Tensor  # [N, H]
    values: Tensor | None  # [N, H] e4m3
    exponents: Tensor | None  # [N, B] uint8, or [N, 1] with one scale a row


@triton.jit(do_not_specialize=["rows"])
def add_norm_quantise_kernel(
    residual,  # [N, H]
    updates,  # [U, N, H]; with places [R, H]
    places,  # [U, N] int32, or None
    weight,  # [H]
    new_residual,  # [N, H]
    hidden,  # [N, H]
    values,  # [N, H] e4m3, or None
    exponents,  # [N, B] or [N, 1] uint8, or None
    rows,
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

    x = tl.load(residual + place, mask=is_column, other=0.0)
    for update in tl.static_range(UPDATES):
        partial = update * rows + row if places is None else tl.load(places + update * rows + row)
        is_added = is_column & (partial >= 0)
        added = tl.load(updates + partial.to(tl.int64) * WIDTH + column, mask=is_added, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(dtype)
    if UPDATES > 0:
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
    residual: Tensor,
    updates: Tensor | None,
    weight: Tensor,
    epsilon: float,
    *,
    places: Tensor | None = None,
    scales: str | None = "block",
) -> Normalised:
    """residual [N, H] and updates [U, N, H], or None, to their sum, that normalised times weight [H], and the latter in e4m3.

    With `places` [U, N] int32 updates are partial rows [R, H] as they came, of any rank and in any order: update u of row n is
    updates[places[u, n]], and none where that is -1.
    The sum is rounded after each update, the norm as `step3.rms_norm` does it, and the values as `handoff.quantise` makes them:
    with a scale for each block of 128 columns ("block"), or by the same rule one for the row ("row"); None leaves e4m3 out.
    All of one dtype, float32, bfloat16 or float16, and contiguous; H at most 16384. Raises ValueError for any other shape or dtype.
    Without updates the residual is given back as it is.
    """
    _check(residual, updates, places, weight, scales)
    rows, width = residual.shape
    count = 0 if updates is None else len(updates if places is None else places)
    blocks = blocks_of(width)
    exponents = {None: 0, "row": 1, "block": blocks}[scales]
    result = Normalised(
        torch.empty_like(residual) if count else residual,
        torch.empty_like(residual),
        torch.empty_like(residual, dtype=torch.float8_e4m3fn) if exponents else None,
        residual.new_empty(rows, exponents, dtype=torch.uint8) if exponents else None,
    )
    if rows:
        padded = triton.next_power_of_2(blocks)
        sizes = {"UPDATES": count, "WIDTH": width, "BLOCK": BLOCK, "PADDED_BLOCKS": padded, "SCALES": exponents}
        add_norm_quantise_kernel[(rows,)](residual, updates, places, weight, *result, rows, epsilon, **sizes, num_warps=WARPS)
    return result


def _check(residual: Tensor, updates: Tensor | None, places: Tensor | None, weight: Tensor, scales: str | None) -> None:
    if residual.dim() != 2 or weight.shape != residual.shape[1:] or not 1 <= len(weight) <= WIDEST:
        raise ValueError(
            f"residual must be [N, H] and weight [H], H from 1 to {WIDEST}, got {list(residual.shape)} and {list(weight.shape)}"
        )
    if updates is not None:
        _check_updates(residual, updates, places)
    elif places is not None:
        raise ValueError("places are given without updates")
    tensors = [residual, weight, *([] if updates is None else [updates])]
    if residual.dtype not in (torch.float32, torch.bfloat16, torch.float16) or len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"no kernel for {', '.join(str(tensor.dtype) for tensor in tensors)}")
    if not all(tensor.is_contiguous() for tensor in tensors) or not (places is None or places.is_contiguous()):
        raise ValueError("every tensor must be contiguous")
    if scales not in ("block", "row", None):
        raise ValueError(f"scales must be block, row or None, got {scales}")


def _check_updates(residual: Tensor, updates: Tensor, places: Tensor | None) -> None:
    rows, width = residual.shape
    if places is None:
        if updates.dim() != 3 or updates.shape[1:] != residual.shape:
            raise ValueError(f"updates must be [U, {rows}, {width}], got {list(updates.shape)}")
    elif updates.dim() != 2 or updates.shape[1] != width or places.dim() != 2 or places.shape[1] != rows:
        raise ValueError(
            f"updates must be [R, {width}] and places [U, {rows}], got {list(updates.shape)} and {list(places.shape)}"
        )
    elif places.dtype != torch.int32:
        raise ValueError(f"places must be int32, got {places.dtype}")
