"""Shapes to try things with, and random weights for them."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from afd_ray.models.config import ModelConfig
from afd_ray.models.layout import elements, expected_shapes, part_of

_TINY = ModelConfig(
    num_hidden_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    head_dim=16,
    share_q_dim=32,
    moe_layers=frozenset({1, 2}),
    moe_num_experts=8,
    moe_top_k=3,
    moe_intermediate_size=32,
    share_expert_dim=32,
    intermediate_size=128,
    vocab_size=512,
    max_position_embedding=1024,
    dtype=torch.float32,
)
_92M = ModelConfig(
    num_hidden_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    head_dim=64,
    share_q_dim=256,
    moe_layers=frozenset(range(1, 7)),
    moe_num_experts=16,
    moe_top_k=3,
    moe_intermediate_size=512,
    share_expert_dim=512,
    intermediate_size=1024,
    vocab_size=4096,
    max_position_embedding=4096,
)
_STEP3 = ModelConfig(
    num_hidden_layers=61,
    hidden_size=7168,
    num_attention_heads=64,
    head_dim=256,
    share_q_dim=2048,
    moe_layers=frozenset(range(4, 60)),
    moe_num_experts=48,
    moe_top_k=3,
    moe_intermediate_size=5120,
    share_expert_dim=5120,
    intermediate_size=18432,
    vocab_size=128815,
    max_position_embedding=65536,
    bos_token_id=0,
    eos_token_ids=(128805,),
)
PRESETS = {"step3-tiny": _TINY, "step3-92m": _92M, "step3": _STEP3}
DRY_RUN_ONLY = frozenset({"step3"})
"""Presets too large to write: only their parameter counts are printed."""


def random_tensors(
    config: ModelConfig, seed: int, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint in turn, in `config.dtype`; each depends on the seed and its key alone."""
    shapes = expected_shapes(config)
    total = sum(elements(shape) for shape in shapes.values())
    done = 0
    for key, shape in shapes.items():
        yield key, random_tensor(key, shape, seed).to(config.dtype)
        done += elements(shape)
        if progress is not None:
            progress(done, total)


def random_tensor(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Norms are 1, embeddings have variance 1, a matrix 1 / fan-in: activations then neither vanish nor explode."""
    part = part_of(key)
    if part == "norms":
        return torch.ones(shape)
    state = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(state, "big") >> 1)
    scale = 1.0 if part == "embedding" else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator).mul_(scale)
