"""Halves of the model with their weights packed for the compiled kernels: the same modules' names and calls, other insides.

Legend of shapes: N rows, H hidden, A heads, D head_dim, K top-k.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from afd_ray.kernels import native
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import AttentionHalf, AttentionLayer, DenseFFN, FFNHalf, FFNLayer, Linear, Norm, Routed


class PackedLinear(nn.Module):
    """`Linear`."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.outputs = len(linear.weight)
        self.packed = _packed(linear)

    def forward(self, x: Tensor) -> Tensor:
        return native.linear(x, self.packed)[:, : self.outputs]


class PackedNorm(nn.Module):
    """`Norm`."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return native.rms_norm(x, self.weight, self.eps)


class PackedAttentionLayer(AttentionLayer):
    """`AttentionLayer`, one call on either side of attention."""

    def __init__(self, plain: AttentionLayer) -> None:
        nn.Module.__init__(self)  # not the plain layer's, which would allocate its weights
        attention = plain.self_attn
        self.input_norm, self.output_norm = plain.input_layernorm.weight, plain.post_attention_layernorm.weight
        self.latent_norm = attention.inter_norm.weight
        self.qkv = _packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.wq, self.o_proj = _packed(attention.wq), _packed(attention.o_proj)
        gate = None if plain.moe is None else plain.moe["gate"]
        assert gate is None or isinstance(gate, Linear)
        self.gate = None if gate is None else _packed(gate)
        hidden, latent = attention.q_proj.weight.shape[::-1]
        self._native = native.AttentionLayer(
            **_addresses(self),  # of what is registered so far
            hidden=hidden,
            latent=latent,
            heads=attention.heads,
            dim=attention.head_dim,
            experts=0 if gate is None else len(gate.weight),
            top_k=plain.top_k,
            eps=plain.input_layernorm.eps,
            normalise=plain.normalise,
        )
        shared = plain.share_expert
        assert shared is None or isinstance(shared, DenseFFN)
        self.share_expert = None if shared is None else PackedDenseFFN(shared)

    def before(self, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """residual [N, H] to q, k, v ready for attention."""
        q, kv = native.before(self._native, residual, cos, sin)
        k, v = kv.chunk(2, dim=1)
        return q, k, v

    def after(self, residual: Tensor, context: Tensor) -> tuple[Tensor, Routed]:
        """Attention output [N, A, D] into the residual [N, H], and the rows that go to the FFN."""
        residual, hidden, experts, weights = native.after(self._native, residual, context)
        return residual, Routed(hidden, None, None) if self.gate is None else Routed(hidden, experts, weights)


class PackedDenseFFN(nn.Module):
    """`DenseFFN` in one call."""

    def __init__(self, plain: DenseFFN) -> None:
        super().__init__()
        for name, tensor in _packed_dense(plain).items():
            self.register_parameter(name, _held(tensor))
        hidden, inner = plain.down_proj.weight.shape
        self._native = native.FFNLayer(**_addresses(self), hidden=hidden, shared_inner=_padded(inner))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, H] to [N, H]."""
        return native.feed_forward(self._native, x, None, None)


class PackedFFNLayer(nn.Module):
    """`FFNLayer` in one call: the shared expert is one of the experts, and a dense layer is a shared expert alone."""

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, plain: FFNLayer, weights: Mapping[str, Tensor] | None = None) -> None:
        """`weights`: packed already, as `packed_weights` names them; of `plain` the shape alone is then looked at."""
        super().__init__()
        for name, tensor in (packed_weights(plain) if weights is None else weights).items():
            self.register_parameter(name, _held(tensor))
        dense = _dense(plain)
        self._native = native.FFNLayer(
            **_addresses(self),
            hidden=plain.hidden,
            shared_inner=0 if dense is None else _padded(dense.down_proj.weight.shape[1]),
            inner=0 if plain.moe is None else self.gate_up.shape[1] * native.GATED_WIDTH,
            count=0 if plain.moe is None else len(self.gate_up),
            first_id=plain.first_id,
            at_home=plain.at_home and plain.moe is not None,
        )

    def forward(self, hidden: Tensor, ids: Tensor | None, weights: Tensor | None) -> Tensor:
        """hidden [N, H], expert ids [N, K] of any integer dtype, weights [N, K]: this rank's partial sum [N, H]."""
        return native.feed_forward(self._native, hidden, ids, weights)


PACKED_STACKS = ("gate_up", "down")
"""Of a PackedFFNLayer: one packed matrix for each expert held."""


def packed_weights(plain: FFNLayer) -> dict[str, Tensor]:
    """What a PackedFFNLayer of the same shape holds; without what is not allocated in `plain`, or counts no expert."""
    weights: dict[str, Tensor] = {}
    dense, moe = _dense(plain), plain.moe
    if dense is not None and not dense.down_proj.weight.is_meta:
        weights |= _packed_dense(dense)
    if moe is not None and len(moe.down_proj):
        weights["gate_up"] = native.pack_gated(moe.gate_proj, moe.up_proj)
        weights["down"] = native.pack_down(moe.down_proj)
    return weights


def _dense(plain: FFNLayer) -> DenseFFN | None:
    """What every row goes through: the shared expert, if it is held here, or all of a dense layer."""
    return plain.share_expert if plain.mlp is None else plain.mlp


def _packed_dense(plain: DenseFFN) -> dict[str, Tensor]:
    return {
        "shared_gate_up": native.pack_gated(plain.gate_proj.weight, plain.up_proj.weight),
        "shared_down": native.pack_down(plain.down_proj.weight),
    }


def _padded(inner: int) -> int:
    """An intermediate dimension as it is packed."""
    return -(-inner // native.GATED_WIDTH) * native.GATED_WIDTH


def packed_attention(half: AttentionHalf) -> AttentionHalf:
    """The same half, packed in place, layer by layer; as it was where the kernels cannot run it."""
    if not _can_pack(half.config):
        return half
    for index in range(half.config.num_hidden_layers):
        _replace(half.layers, str(index), PackedAttentionLayer)
    _replace(half, "norm", PackedNorm)
    _replace(half, "lm_head", PackedLinear)
    return half


def packed_ffn(half: FFNHalf) -> FFNHalf:
    """The same half, packed in place, layer by layer; as it was where the kernels cannot run it."""
    if not _can_pack(half.config):
        return half
    for index in range(half.config.num_hidden_layers):
        _replace(half.layers, str(index), PackedFFNLayer)
    return half


def _can_pack(config: ModelConfig) -> bool:
    """The kernels step through rows in whole vectors."""
    sizes = (config.hidden_size, config.share_q_dim, config.head_dim)
    return config.dtype == torch.bfloat16 and all(size % native.WIDTH == 0 for size in sizes) and native.available()


def _replace(owner: nn.Module, name: str, packed: Callable[[Any], nn.Module]) -> None:
    owner.register_module(name, packed(owner.get_submodule(name)))


def _packed(*linears: Linear) -> nn.Parameter:
    """The matrix of one, or of several with the same input, their outputs side by side."""
    return _held(native.pack(torch.cat([linear.weight for linear in linears])))


def _addresses(module: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


def _held(packed: Tensor) -> nn.Parameter:
    return nn.Parameter(packed, requires_grad=False)
