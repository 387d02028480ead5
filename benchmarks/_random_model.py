"""Halves with random weights made where they are needed, the same in every process on devices of one kind: nothing is read or written."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from afd_ray.models.config import ModelConfig
from afd_ray.models.layout import Unallocated, expected_shapes
from afd_ray.models.scaled import NARROW_PARTS, keep_as_stored
from afd_ray.models.shards import E4M3_NAME, StoredTensor
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard, Step3Model

SPREAD = 64.0
"""Standard deviation of e4m3 numbers before their scale."""


def random_attention(config: ModelConfig, device: torch.device, *, narrow: bool) -> AttentionHalf:
    """`narrow`: projections in e4m3."""
    with Unallocated():
        half = AttentionHalf(config)
    if narrow:
        keep_as_stored(half, _as_stored(config), NARROW_PARTS, None)
    _fill(half, config, device)
    return half


def random_ffn(config: ModelConfig, device: torch.device, *, narrow: bool) -> FFNHalf:
    """All of it; `narrow`: in e4m3."""
    shard = FFNShard.whole(config)
    with Unallocated():
        half = FFNHalf(config, shard)
    if narrow:
        keep_as_stored(half, _as_stored(config), NARROW_PARTS, shard)
    _fill(half, config, device)
    return half


def random_model(config: ModelConfig, device: torch.device, *, narrow: bool) -> Step3Model:
    """Both, in plain torch."""
    with Unallocated():
        model = Step3Model(config)
    model.attention, model.ffn = random_attention(config, device, narrow=narrow), random_ffn(config, device, narrow=narrow)
    return model.requires_grad_(False).eval()


def _as_stored(config: ModelConfig) -> dict[str, StoredTensor]:
    """As if files had every weight in e4m3."""
    return {key: StoredTensor(Path(), key, E4M3_NAME, shape, 0, 0) for key, shape in expected_shapes(config).items()}


def _fill(half: nn.Module, config: ModelConfig, device: torch.device) -> None:
    tensors = {name: _random(name, parameter, config, device) for name, parameter in half.named_parameters()}
    half.load_state_dict(tensors, assign=True)
    half.requires_grad_(False).eval()


def _random(name: str, parameter: Tensor, config: ModelConfig, device: torch.device) -> Tensor:
    """Norms are 1, embeddings have variance 1, a matrix 1 / fan-in."""
    shape = parameter.shape
    if name.endswith("scales"):
        return torch.full(shape, (shape[-1] * 128) ** -0.5 / SPREAD, device=device)
    narrow = parameter.dtype == torch.float8_e4m3fn
    out = torch.empty(shape, dtype=parameter.dtype if narrow else config.dtype, device=device)
    if len(shape) == 1:
        return out.fill_(1.0)
    generator = torch.Generator(device).manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big"))
    scale = SPREAD if narrow else 1.0 if name.startswith("embed_tokens") else shape[-1] ** -0.5
    for matrix in out.view(-1, *shape[-2:]):
        matrix.copy_(torch.randn(matrix.shape, generator=generator, device=device).mul_(scale))
    return out
