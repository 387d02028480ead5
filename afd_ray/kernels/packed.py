"""Halves of the model with their weights packed for the compiled kernels: the same modules' names and calls, other insides.

Legend of shapes: N rows, H hidden, Q query latent, A heads, D head_dim, E experts, K top-k, M intermediate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from afd_ray.kernels import native
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import (
    AttentionHalf,
    DenseFFN,
    Experts,
    FFNHalf,
    Linear,
    MultiMatrixFactorizationAttention,
    Norm,
)


class PackedLinear(nn.Module):
    """`Linear`, or several with the same input, their outputs side by side."""

    def __init__(self, *linears: Linear) -> None:
        super().__init__()
        self.outputs = sum(len(linear.weight) for linear in linears)
        self.packed = _held(native.pack(torch.cat([linear.weight for linear in linears])))

    def forward(self, x: Tensor) -> Tensor:
        return native.linear(x, self.packed)[:, : self.outputs]


class PackedNorm(nn.Module):
    """`Norm`."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return native.rms_norm(x, self.weight, self.eps)


class PackedAttention(nn.Module):
    """`MultiMatrixFactorizationAttention`, its three projections of x as one."""

    def __init__(self, plain: MultiMatrixFactorizationAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = plain.heads, plain.head_dim
        self.latent = len(plain.q_proj.weight)
        self.qkv_proj = PackedLinear(plain.q_proj, plain.k_proj, plain.v_proj)
        self.inter_norm = PackedNorm(plain.inter_norm)
        self.wq = PackedLinear(plain.wq)
        self.o_proj = PackedLinear(plain.o_proj)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, H] to rotated q [N, A, D], rotated k [N, D] and v [N, D]."""
        latent, k, v = self.qkv_proj(x).split((self.latent, self.head_dim, self.head_dim), dim=1)
        q = native.rotate(self.wq(self.inter_norm(latent)), cos, sin, self.heads)
        return q, native.rotate(k, cos, sin, 1).squeeze(1), v


class PackedExperts(nn.Module):
    """`Experts`, gate and up as one matrix."""

    def __init__(self, plain: Experts) -> None:
        super().__init__()
        self.gate_up = _held(native.pack_gated(plain.gate_proj, plain.up_proj))
        self.down = _held(native.pack_down(plain.down_proj))

    def forward(self, x: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        """x [N, H], local expert indices [N, K] (negative: not held here) and weights [N, K] to the weighted sum [N, H]."""
        return native.experts(x, local, weights, self.gate_up, self.down)


class PackedDenseFFN(nn.Module):
    """`DenseFFN`: one expert that every row chooses."""

    def __init__(self, plain: DenseFFN) -> None:
        super().__init__()
        self.gate_up = _held(native.pack_gated(plain.gate_proj.weight[None], plain.up_proj.weight[None]))
        self.down = _held(native.pack_down(plain.down_proj.weight[None]))

    def forward(self, x: Tensor) -> Tensor:
        everyone, whole = x.new_zeros(len(x), 1, dtype=torch.int64), x.new_ones(len(x), 1)
        return native.experts(x, everyone, whole, self.gate_up, self.down)


def packed_attention(half: AttentionHalf) -> AttentionHalf:
    """The same half, packed in place, module by module; as it was where the kernels cannot run it."""
    if not _can_pack(half.config):
        return half
    for index in range(half.config.num_hidden_layers):
        layer = half.layer(index)
        _replace(layer, "self_attn", PackedAttention)
        _replace(layer, "input_layernorm", PackedNorm)
        _replace(layer, "post_attention_layernorm", PackedNorm)
        if layer.moe is not None:
            _replace(layer.moe, "gate", PackedLinear)
    _replace(half, "norm", PackedNorm)
    _replace(half, "lm_head", PackedLinear)
    return half


def packed_ffn(half: FFNHalf) -> FFNHalf:
    """The same half, packed in place, module by module; as it was where the kernels cannot run it."""
    if not _can_pack(half.config):
        return half
    for layer in half.layers:
        if layer.mlp is not None:
            _replace(layer, "mlp", PackedDenseFFN)
        else:
            _replace(layer, "moe", PackedExperts)
            _replace(layer, "share_expert", PackedDenseFFN)
    return half


def _can_pack(config: ModelConfig) -> bool:
    """The kernels step through rows in whole vectors."""
    sizes = (config.hidden_size, config.share_q_dim, config.head_dim)
    return config.dtype == torch.bfloat16 and all(size % native.WIDTH == 0 for size in sizes) and native.available()


def _replace(owner: nn.Module, name: str, packed: Callable[[Any], nn.Module]) -> None:
    owner.register_module(name, packed(owner.get_submodule(name)))


def _held(packed: Tensor) -> nn.Parameter:
    return nn.Parameter(packed, requires_grad=False)
