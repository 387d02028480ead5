"""What a token costs at the peaks of its hardware, and what keeps an FFN busy: arXiv:2507.19427 sections 4.2 and 5.3 to 5.5."""

from collections.abc import Sequence

from afd_ray.planning.accelerators import SERVER, Accelerator
from afd_ray.planning.shapes import WEIGHT_BYTES, ModelShape

STAGES = 3
"""Attention, transfer and FFN share a token's time (section 3.1)."""
TPOT_MS = 50.0
DISPATCH_BYTES = 1
"""A value on its way to the FFN: FP8."""
COMBINE_BYTES = 2
"""A value on its way back: bf16."""


def attention_usd(shape: ModelShape, gpu: Accelerator, context: int) -> float:
    """Of a decoded token: its cache is moved while attention computes, then come the projections, compute-bound."""
    core = max(shape.attention_flops(context) * gpu.usd_per_flop, shape.moved_bytes(context) * gpu.usd_per_byte)
    return core + shape.linear_flops * gpu.usd_per_flop


def ffn_usd(shape: ModelShape, gpu: Accelerator) -> float:
    """Of a decoded token, when the batch is large enough to hide the reading of the weights."""
    return shape.ffn_flops * gpu.usd_per_flop


def least_usd(shape: ModelShape, gpus: Sequence[Accelerator], context: int) -> float:
    """Of a decoded token, each half on the cheapest of `gpus` for it: the bound of every plan."""
    return min(attention_usd(shape, gpu, context) for gpu in gpus) + min(ffn_usd(shape, gpu) for gpu in gpus)


def dense_batch(gpu: Accelerator) -> float:
    """Rows from which a product with 8-bit weights computes for longer than it reads them."""
    return gpu.flops * WEIGHT_BYTES / (2 * gpu.memory_bytes_s)


def least_sparsity(hidden: int, layers: int, gpu: Accelerator, tpot_ms: float = TPOT_MS) -> float:
    """The least share of experts that a token must meet for their server to be busy within its network's budget.

    An expert is busy from `dense_batch` rows on, so the server from dense_batch / sparsity; more than `most_rows` it cannot receive.
    """
    return dense_batch(gpu) / most_rows(hidden, layers, SERVER * gpu.nic_bytes_s, tpot_ms)


def most_rows(hidden: int, layers: int, bytes_s: float, tpot_ms: float = TPOT_MS) -> float:
    """Rows of a micro-batch that cross a network of `bytes_s` and come back within a stage."""
    return bytes_s * tpot_ms * 1e-3 / STAGES / (layers * hidden * (DISPATCH_BYTES + COMBINE_BYTES))
