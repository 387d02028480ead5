"""The launches whose code the tests bound, at Step-3's sizes, and the bounds."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.kernels.gpu import (
    decode_attention,
    expert_gemm,
    latent_attention,
    linear,
    norm_quantise,
    prefill_attention,
    quantise_rows,
    rope_kv_write,
    router,
)
from afd_ray.kernels.gpu.halves import GPUAttentionLayer, GPUFFNLayer, Returned, StepRows
from afd_ray.kernels.gpu.paged_softmax import Rows
from afd_ray.kernels.quantised import quantise_attention, quantise_dense, quantise_experts
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import AttentionLayer, FFNLayer, FFNShard, Narrow

ROWS, HIDDEN, HEADS, DIM, EXPERTS = 128, 7168, 64, 256, 48


class Bounds(NamedTuple):
    """Of one kernel."""

    registers: int
    shared_bytes: int
    wgmma: bool = False
    asynchronous_copies: bool = False
    spills: int = 0


class Launch(NamedTuple):
    launch: Callable[[], object]
    bounds: dict[str, Bounds]
    """By kernel, all that the launcher starts."""
    full: bool = False
    """Whether only the full suite compiles it."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def ints(count: int) -> Tensor:
    return meta(count, dtype=torch.int32)


def decode(cached: torch.dtype, splits: int, page: int = 64, heads: int = HEADS, key_heads: int = 1, dim: int = DIM) -> Tensor:
    blocks = meta(1024, page, key_heads, 2, dim, dtype=cached)
    return decode_attention.attend(Rows(meta(64, heads, dim), blocks, ints(8192), ints(64), ints(64)), splits=splits)


def narrow_decode(cached: torch.dtype, splits: int, dim: int = DIM) -> None:
    """As `decode`, and what it gives in e4m3."""
    blocks, into = meta(1024, 64, 1, 2, dim, dtype=cached), narrow_rows(64, HEADS * dim)
    rows = Rows(meta(64, HEADS, dim), blocks, ints(8192), ints(64), ints(64))
    decode_attention.attend_narrow(rows, into, splits=splits)


def latents(cached: torch.dtype, splits: int) -> Tensor:
    """DeepSeek-V3's 128 heads."""
    q = meta(64, 128, 576, dtype=torch.float16 if cached == torch.float8_e4m3fn else cached)
    rows = Rows(q, meta(1024, 64, 576, dtype=cached), ints(8192), ints(64), ints(64))
    return latent_attention.attend_latents(rows, 64, scale=192**-0.5, splits=splits)


def prefill(cached: torch.dtype) -> Tensor:
    rows = Rows(meta(512, HEADS, DIM), meta(1024, 64, 1, 2, DIM, dtype=cached), ints(8192), ints(512), ints(512))
    return prefill_attention.attend_chunks(rows, ints(256), ints(256))


def norm(scales: str | None) -> object:
    return norm_quantise.add_norm_quantise(meta(ROWS, HIDDEN), meta(2, ROWS, HIDDEN), meta(HIDDEN), 1e-5, scales=scales)


def combined_rows() -> object:
    """Partial rows of two instances, as routed dispatch returns them."""
    residual, places = meta(ROWS, HIDDEN), meta(2, ROWS, dtype=torch.int32)
    return norm_quantise.add_norm_quantise(residual, meta(2 * ROWS, HIDDEN), meta(HIDDEN), 1e-5, places=places)


def dequantised_rows() -> Tensor:
    narrow = Narrow(meta(ROWS, HIDDEN, dtype=torch.float8_e4m3fn), meta(ROWS, HIDDEN // 128, dtype=torch.uint8))
    return quantise_rows.dequantise_rows(narrow, torch.bfloat16)


def rotation(cached: torch.dtype) -> None:
    table = meta(ROWS, DIM // 2, dtype=torch.float32)
    tokens = meta(8192, 2 * DIM, dtype=cached)
    rope_kv_write.rotate_and_write(meta(ROWS, HEADS, DIM), meta(ROWS, DIM), meta(ROWS, DIM), table, table, ints(ROWS), tokens)


def experts(dtype: torch.dtype, held: int = EXPERTS // 2, inner: int = 640) -> Tensor:
    """One FFN rank of 16, tensor parallel 8 and expert parallel 2, at the batch of the paper."""
    gate, up, down = (
        meta(held, inner, HIDDEN, dtype=dtype),
        meta(held, inner, HIDDEN, dtype=dtype),
        meta(held, HIDDEN, inner, dtype=dtype),
    )
    x, ids, weights = meta(2048, HIDDEN, dtype=dtype), meta(2048, 3, dtype=torch.int32), meta(2048, 3)
    if dtype != torch.float8_e4m3fn:
        return expert_gemm.feed_forward(expert_gemm.Experts(gate, up, down), x, ids, weights)
    wide, narrow = (
        meta(held, *shape, dtype=torch.float32) for shape in ((inner // 128, HIDDEN // 128), (HIDDEN // 128, inner // 128))
    )
    scaled = expert_gemm.Experts(gate, up, down, wide, wide, narrow)
    return expert_gemm.feed_forward(scaled, x, ids, weights, exponents=meta(2048, HIDDEN // 128, dtype=torch.uint8))


def narrow_rows(rows: int, width: int) -> Narrow:
    return Narrow(meta(rows, width, dtype=torch.float8_e4m3fn), meta(rows, width // 128, dtype=torch.uint8))


def projection(outputs: int, inputs: int, tile: int = 128) -> object:
    """Of the paper's batch."""
    weight = meta(outputs, inputs, dtype=torch.float8_e4m3fn)
    scales = meta(outputs // tile, inputs // 128, dtype=torch.float32)
    return linear.product(narrow_rows(64, inputs), linear.ScaledWeight(weight, scales, tile))


def dense_layer() -> Tensor:
    """A shared expert's part on one FFN rank of 16, filled up to whole blocks."""
    inner, narrow = 384, torch.float8_e4m3fn
    gate, down = meta(1, inner, HIDDEN, dtype=narrow), meta(1, HIDDEN, inner, dtype=narrow)
    wide, long = (
        meta(1, *shape, dtype=torch.float32) for shape in ((inner // 128, HIDDEN // 128), (HIDDEN // 128, inner // 128))
    )
    values, exponents = narrow_rows(2048, HIDDEN)
    return expert_gemm.feed_every_row(expert_gemm.Experts(gate, gate, down, wide, wide, long), values, exponents=exponents)


def norm_of_parts(residual: bool) -> object:
    """What follows a projection: of the output, or of the query's latents."""
    width = HIDDEN if residual else 2048
    parts = linear.Parts(meta(5, 64, 2 * width, dtype=torch.float32)).columns(0, width)
    return norm_quantise.add_norm_quantise(meta(64, width) if residual else None, None, meta(width), 1e-5, product=parts)


def rotation_of_parts() -> None:
    table, parts = meta(64, DIM // 2, dtype=torch.float32), linear.Parts(meta(5, 64, 2560, dtype=torch.float32))
    k, v, tokens = parts.columns(2048, DIM), parts.columns(2304, DIM), meta(8192, 2 * DIM)
    rope_kv_write.rotate_and_write(meta(64, HEADS, DIM), k, v, table, table, ints(64), tokens)


def layer(config: ModelConfig, page: int, narrow: bool = False) -> None:
    """A layer with experts of both halves, as the engine runs it: some rows decode, some are of a prompt, and come back from two instances.

    `narrow`: all weights in e4m3.
    """
    count, dtype = 9, config.dtype
    with torch.device("meta"):
        attention = AttentionLayer(config, 1).to(dtype).requires_grad_(False)
        ffn = FFNLayer(config, 1, FFNShard((0, 1), at_home=True)).to(dtype).requires_grad_(False)
        if narrow:
            quantise_attention(attention)
            quantise_experts(ffn)
            quantise_dense(ffn)
    table, rows = meta(count, config.head_dim // 2, dtype=torch.float32), meta(count, config.hidden_size, dtype=dtype)
    returned = Returned(meta(2 * count, config.hidden_size, dtype=dtype), meta(2, count, dtype=torch.int32))
    step = StepRows(table, table, ints(count), ints(64), ints(count), ints(count), ints(2), ints(2), decoding=5)
    GPUAttentionLayer(attention)(rows, returned, meta(64, page, config.kv_width, dtype=dtype), step)
    ids = meta(count, config.moe_top_k, dtype=torch.uint8)
    GPUFFNLayer(ffn, dtype)(rows, ids, meta(count, config.moe_top_k, dtype=dtype))


LAYERS = {
    "step3-tiny": partial(layer, replace(PRESETS["step3-tiny"], moe_intermediate_size=128, share_expert_dim=128), 4),
    "step3-92m": partial(layer, PRESETS["step3-92m"], 16),
    "step3": partial(layer, replace(PRESETS["step3"], moe_layers=frozenset({1})), 64),
    "step3, fp8": partial(layer, replace(PRESETS["step3"], moe_layers=frozenset({1})), 64, narrow=True),
}
"""By the model's name."""


STREAMED = Bounds(registers=184, shared_bytes=229376, wgmma=True, asynchronous_copies=True)
DEQUANTISED = Bounds(registers=232, shared_bytes=163840, wgmma=True, asynchronous_copies=True)
LATENT = Bounds(registers=240, shared_bytes=221184, wgmma=True, asynchronous_copies=True)
LATENT_DEQUANTISED = Bounds(registers=255, shared_bytes=221184, wgmma=True, asynchronous_copies=True, spills=90)
"""Sums of 64 x 512 take half of all registers: places in shared memory, where what was converted goes, are what spills."""
COMBINED = Bounds(registers=64, shared_bytes=4096)
TILED = Bounds(registers=232, shared_bytes=163840, wgmma=True, asynchronous_copies=True)
PRODUCT = Bounds(registers=208, shared_bytes=163840, wgmma=True, asynchronous_copies=True)
LIGHT = Bounds(registers=80, shared_bytes=8192)
LINEAR = Bounds(registers=208, shared_bytes=163840, wgmma=True, asynchronous_copies=True)

EXPERT_BOUNDS = {"order_kernel": LIGHT, "gate_up_kernel": PRODUCT, "down_kernel": PRODUCT}

LAUNCHES = {
    "decode, bf16": Launch(lambda: decode(torch.bfloat16, 2), {"attend_kernel": STREAMED, "combine_kernel": COMBINED}),
    "decode, fp8": Launch(lambda: decode(torch.float8_e4m3fn, 2), {"attend_kernel": DEQUANTISED, "combine_kernel": COMBINED}),
    "decode, bf16, one split": Launch(lambda: decode(torch.bfloat16, 1), {"attend_kernel": STREAMED}, full=True),
    "decode, bf16, blocks of 16": Launch(lambda: decode(torch.bfloat16, 1, page=16), {"attend_kernel": STREAMED}, full=True),
    "decode, fp8, blocks of 16": Launch(
        lambda: decode(torch.float8_e4m3fn, 1, page=16), {"attend_kernel": DEQUANTISED}, full=True
    ),
    "decode to e4m3, bf16": Launch(
        lambda: narrow_decode(torch.bfloat16, 2), {"attend_kernel": STREAMED, "combine_kernel": COMBINED}, full=True
    ),
    "decode to e4m3, bf16, one split": Launch(lambda: narrow_decode(torch.bfloat16, 1), {"attend_kernel": STREAMED}),
    "decode to e4m3, fp8, one split": Launch(lambda: narrow_decode(torch.float8_e4m3fn, 1), {"attend_kernel": DEQUANTISED}),
    "decode to e4m3, heads of 128": Launch(
        lambda: narrow_decode(torch.bfloat16, 2, dim=128), {"attend_kernel": STREAMED, "combine_kernel": COMBINED}, full=True
    ),
    "decode to e4m3, heads of 128, one split": Launch(
        lambda: narrow_decode(torch.bfloat16, 1, dim=128), {"attend_kernel": STREAMED}, full=True
    ),
    "latents, bf16": Launch(lambda: latents(torch.bfloat16, 2), {"attend_kernel": LATENT, "combine_kernel": COMBINED}, full=True),
    "latents, fp8": Launch(
        lambda: latents(torch.float8_e4m3fn, 2), {"attend_kernel": LATENT_DEQUANTISED, "combine_kernel": COMBINED}, full=True
    ),
    "prefill, bf16": Launch(lambda: prefill(torch.bfloat16), {"prefill_kernel": TILED}, full=True),
    "prefill, fp8": Launch(lambda: prefill(torch.float8_e4m3fn), {"prefill_kernel": DEQUANTISED}, full=True),
    "experts, fp8": Launch(lambda: experts(torch.float8_e4m3fn), EXPERT_BOUNDS),
    "projection, fp8": Launch(lambda: projection(HIDDEN, HEADS * DIM), {"linear_kernel": LINEAR}),
    "projection, fp8, tiles of 64": Launch(lambda: projection(2176, HIDDEN, 64), {"linear_kernel": LINEAR}, full=True),
    "shared expert, fp8": Launch(dense_layer, dict.fromkeys(("gate_up_kernel", "down_kernel"), PRODUCT), full=True),
    "norm of a projection": Launch(lambda: norm_of_parts(True), {"add_norm_quantise_kernel": LIGHT}, full=True),
    "norm of latents": Launch(lambda: norm_of_parts(False), {"add_norm_quantise_kernel": LIGHT}, full=True),
    "rotate and write a projection": Launch(rotation_of_parts, {"rotate_and_write_kernel": LIGHT}, full=True),
    "experts, bf16": Launch(lambda: experts(torch.bfloat16), EXPERT_BOUNDS, full=True),
    "norm and e4m3 by block": Launch(lambda: norm("block"), {"add_norm_quantise_kernel": LIGHT}, full=True),
    "norm and e4m3 by row": Launch(lambda: norm("row"), {"add_norm_quantise_kernel": LIGHT}, full=True),
    "norm of partial rows": Launch(combined_rows, {"add_norm_quantise_kernel": LIGHT}, full=True),
    "rows to e4m3": Launch(lambda: quantise_rows.quantise_rows(meta(ROWS, HIDDEN)), {"quantise_rows_kernel": LIGHT}, full=True),
    "rows from e4m3": Launch(dequantised_rows, {"dequantise_rows_kernel": LIGHT}, full=True),
    "rotate and write, bf16": Launch(lambda: rotation(torch.bfloat16), {"rotate_and_write_kernel": LIGHT}, full=True),
    "rotate and write, fp8": Launch(lambda: rotation(torch.float8_e4m3fn), {"rotate_and_write_kernel": LIGHT}, full=True),
    "router": Launch(lambda: router.route(meta(ROWS, EXPERTS), 3, False), {"route_kernel": LIGHT}, full=True),
}
