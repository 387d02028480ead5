"""How much of a GPU keys and values may take: what is left of an actor's share beside its weights and what a step needs."""

from typing import NamedTuple

from afd_ray.engine.compute import Needs
from afd_ray.kernels.gpu.capture import buckets
from afd_ray.models.config import ModelConfig

RESERVED = 0.08
"""Share of the GPU that is left alone: the driver's context, compiled kernels, what torch's allocator cannot join."""
SPLIT_ROWS = 4096
"""Rows times splits of decode attention, about: it takes no more splits than keep the multiprocessors busy."""


GRAPH_BYTES = 64 << 10
"""Of one layer's launches in graphs, about a dozen for each half."""


class GPUMemory(NamedTuple):
    """Bytes, as the driver counts them."""

    total: int
    free: int
    held: int
    """By this process: weights, and whatever torch keeps beside them."""


def cache_bytes(memory: GPUMemory, share: float, workspace_bytes: int) -> int:
    """For keys and values, with what is left alone taken off; 0 where nothing is left.

    `share`: of the GPU, above 0; the actors on one GPU have 1 together. Others' memory counts only where they took more than theirs.

    >>> cache_bytes(GPUMemory(total=80_000, free=50_000, held=25_000), share=1.0, workspace_bytes=3_600)
    40000
    >>> cache_bytes(GPUMemory(total=80_000, free=50_000, held=25_000), share=0.5, workspace_bytes=3_600)
    8200
    """
    allowed = int(min(share, 1.0) * memory.total * (1 - RESERVED)) - memory.held
    free = memory.free - int(min(share, 1.0) * memory.total * RESERVED)
    return max(0, min(allowed, free) - workspace_bytes)


def graph_bytes(config: ModelConfig, needs: Needs) -> int:
    """What captured graphs, their static tensors and what they all need in between take, about; a graph's own share is a guess, until a GPU has captured one."""
    sizes, layers = buckets(needs.decoding), config.num_hidden_layers
    row = config.hidden_size * config.dtype.itemsize * (4 + needs.instances) + 8 * (config.head_dim + config.moe_top_k + 8)
    halves = 1 if needs.instances else 2
    slot = sizes[-1] * row + len(sizes) * (halves * layers + 1) * GRAPH_BYTES
    return needs.slots * slot + workspace_bytes(config, needs.decoding)


def workspace_bytes(config: ModelConfig, rows: int) -> int:
    """What stages of micro-batches of so many rows need beside weights and cache, about and at most.

    The widest stage counts, and the residuals of four slots: of attention the queries and what is attended, twice, and the parts of decode
    attention's splits; of the FFN what the experts give, in float32, and the widest intermediate rows; of the head the logits.
    """
    item, hidden = config.dtype.itemsize, config.hidden_size
    wide = config.num_attention_heads * config.head_dim
    attention = rows * 4 * wide * item + SPLIT_ROWS * wide * 4
    inner = max(3 * config.intermediate_size, 2 * config.moe_top_k * config.moe_intermediate_size, 3 * config.share_expert_dim)
    ffn = rows * (inner * item + 2 * hidden * 4)
    logits = rows * config.vocab_size * (item + 4)
    return max(attention, ffn, logits) + rows * hidden * item * 12
