"""Step-3's text model in plain torch, as the two halves that a cluster separates.

Legend of shapes: N rows (tokens), H hidden, Q query latent, A heads, D head_dim, T context, E experts, K top-k, I intermediate, V vocab.

`AttentionHalf` and `FFNHalf` are the specification: every faster path must equal `Step3Model`, which joins them in one process.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_ray.models.config import ModelConfig


class Narrow(NamedTuple):
    """Rows in 8 bits, as `handoff.quantise` makes them."""

    values: Tensor  # [N, H] e4m3
    exponents: Tensor  # [N, H / 128] uint8


class Routed(NamedTuple):
    """What attention hands to the FFN for one layer."""

    hidden: Tensor  # [N, H], after post_attention_layernorm
    experts: Tensor | None  # [N, K] int64; None in a dense layer
    weights: Tensor | None  # [N, K], in the dtype of hidden; None in a dense layer
    narrow: Narrow | None = None
    """hidden in 8 bits, where a GPU's norm has made that, or a wire of 8 bits has brought it; `hidden` may then be its values."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32, cast back (arXiv:2507.19427 uses the plain weight, not 1 + weight)."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * x32.to(x.dtype)).to(x.dtype)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D/2] in float32 of positions [N]."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions.float()[:, None] * inverse  # [N, D/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split: x [..., D] with cos and sin broadcastable to [..., D/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)): x [N, H], gate and up [I, H], down [H, I]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def route(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Top-k of the softmax over all experts in float32: logits [N, E] to ids [N, K] int64 and weights [N, K] float32."""
    weights, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights


class Linear(nn.Module):
    """A weight [out, in] without bias."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Norm(nn.Module):
    """RMSNorm with its weight [size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class CacheScales(NamedTuple):
    """What keys and values in e4m3 are multiplied by, and divided by when they are written."""

    key: float = 1.0
    value: float = 1.0


class MultiMatrixFactorizationAttention(nn.Module):
    """MFA: a low-rank query of many heads over one key head and one value head (section 2 of the paper)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj = Linear(config.share_q_dim, config.hidden_size)
        self.k_proj = Linear(config.head_dim, config.hidden_size)
        self.v_proj = Linear(config.head_dim, config.hidden_size)
        self.inter_norm = Norm(config.share_q_dim, config.rms_norm_eps)
        self.wq = Linear(self.heads * config.head_dim, config.share_q_dim)
        self.o_proj = Linear(config.hidden_size, self.heads * config.head_dim)
        self.cache_scales = CacheScales()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, H] to rotated q [N, A, D], rotated k [N, D] and v [N, D]."""
        q = self.wq(self.inter_norm(self.q_proj(x))).view(-1, self.heads, self.head_dim)
        return rotate(q, cos[:, None], sin[:, None]), rotate(self.k_proj(x), cos, sin), self.v_proj(x)


def attend(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Causal attention of one sequence: q [N, A, D] at positions start..start+N-1 over k and v [T, D], T = start + N; gives [N, A, D]."""
    n, heads, dim = q.shape
    total = k.shape[0]
    mask = None
    if n > 1:
        positions = torch.arange(start, start + n, device=q.device)
        mask = (torch.arange(total, device=q.device) <= positions[:, None]).repeat_interleave(heads, dim=0)  # [N*A, T]
    out = F.scaled_dot_product_attention(q.reshape(1, 1, n * heads, dim), k[None, None], v[None, None], attn_mask=mask)
    return out.view(n, heads, dim)


class AttentionLayer(nn.Module):
    """Norms, attention and the router of one layer: all of it but the FFN, or but the routed experts."""

    def __init__(self, config: ModelConfig, layer: int, shared: bool = False) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.top_k, self.normalise = config.moe_top_k, config.norm_expert_weight
        self.input_layernorm = Norm(hidden, config.rms_norm_eps)
        self.self_attn = MultiMatrixFactorizationAttention(config)
        self.post_attention_layernorm = Norm(hidden, config.rms_norm_eps)
        self.moe = nn.ModuleDict({"gate": Linear(config.moe_num_experts, hidden)}) if config.is_moe(layer) else None
        shares = shared and config.is_moe(layer)
        self.share_expert: nn.Module | None = DenseFFN(hidden, config.share_expert_dim) if shares else None

    def before(self, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """residual [N, H] to q, k, v ready for attention."""
        return self.self_attn.project(self.input_layernorm(residual), cos, sin)

    def after(self, residual: Tensor, context: Tensor) -> tuple[Tensor, Routed]:
        """Attention output [N, A, D] into the residual [N, H], and the rows that go to the FFN."""
        residual = residual + self.self_attn.o_proj(context.flatten(1))
        hidden = self.post_attention_layernorm(residual)
        if self.moe is None:
            return residual, Routed(hidden, None, None)
        experts, weights = route(self.moe["gate"](hidden), self.top_k, self.normalise)
        return residual, Routed(hidden, experts, weights.to(hidden.dtype))

    def share(self, hidden: Tensor) -> Tensor | None:
        """The shared expert of the rows [N, H] that `after` gave; None where the FFN computes it, or there is none."""
        return None if self.share_expert is None else self.share_expert(hidden)


class AttentionHalf(nn.Module):
    """What an attention actor holds: embedding, attention layers with routers, final norm and head."""

    def __init__(self, config: ModelConfig, shared: bool = False) -> None:
        """`shared`: with the shared experts, which the FFN ranks then leave out."""
        super().__init__()
        self.config, self.shared = config, shared
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(AttentionLayer(config, i, shared) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.vocab_size, config.hidden_size)

    def scale_cache(self, key: float | None, value: float | None) -> None:
        """In all layers, in place of the scales that were read with them; None: leave those."""
        for index in range(self.config.num_hidden_layers):
            attention = self.layer(index).self_attn
            read = attention.cache_scales
            attention.cache_scales = CacheScales(key or read.key, value or read.value)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, self.config.head_dim, self.config.rope_theta)

    def logits(self, residual: Tensor) -> Tensor:
        """residual [N, H] after the last layer to logits [N, V]."""
        logits: Tensor = self.lm_head(self.norm(residual))
        return logits

    def layer(self, index: int) -> AttentionLayer:
        layer = self.layers[index]
        assert isinstance(layer, AttentionLayer)
        return layer


class DenseFFN(nn.Module):
    """SwiGLU of a dense layer or of the shared expert, or a tensor-parallel slice of it."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(intermediate, hidden)
        self.up_proj = Linear(intermediate, hidden)
        self.down_proj = Linear(hidden, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Experts(nn.Module):
    """Routed experts, stacked: all of a layer's, or those of one instance, each possibly a tensor-parallel slice."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, x: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        """x [N, H], local expert indices [N, K] (negative: not held here) and weights [N, K] to the weighted sum [N, H]."""
        out = torch.zeros_like(x)
        for expert in range(self.gate_proj.shape[0]):
            rows, slots = (local == expert).nonzero(as_tuple=True)
            if rows.numel():
                y = swiglu(x[rows], self.gate_proj[expert], self.up_proj[expert], self.down_proj[expert])
                out = out.index_add(0, rows, y * weights[rows, slots, None])
        return out


class Slice(NamedTuple):
    """One of `parts` nearly equal, contiguous parts of a dimension."""

    part: int = 0
    parts: int = 1

    def of(self, size: int) -> slice:
        return slice(self.part * size // self.parts, (self.part + 1) * size // self.parts)

    def width(self, size: int) -> int:
        return (self.part + 1) * size // self.parts - self.part * size // self.parts


class FFNShard(NamedTuple):
    """The part of every FFN that one rank holds."""

    experts: tuple[int, ...]
    """The routed experts held, as the model numbers them."""
    routed: Slice = Slice()
    """This rank's slice of each routed expert's intermediate dimension: tensor parallel inside its instance."""
    dense: Slice = Slice()
    """This rank's slice of the shared experts and dense layers."""
    first_id: int = 0
    """Id on the wire of the first expert held; the others follow."""
    at_home: bool = False
    """Whether the shared expert serves only the rows whose first expert is held here, so that the sum over instances counts it once."""
    shared: bool = True
    """Whether shared experts are held here, not by the attention ranks."""

    @classmethod
    def whole(cls, config: ModelConfig) -> "FFNShard":
        """All of every FFN."""
        return cls(tuple(range(config.moe_num_experts)))


class FFNLayer(nn.Module):
    """The FFN of one layer as one rank holds it."""

    def __init__(self, config: ModelConfig, layer: int, shard: FFNShard) -> None:
        super().__init__()
        hidden, moe = config.hidden_size, config.is_moe(layer)
        self.moe = Experts(len(shard.experts), hidden, shard.routed.width(config.moe_intermediate_size)) if moe else None
        self.share_expert = DenseFFN(hidden, shard.dense.width(config.share_expert_dim)) if moe and shard.shared else None
        self.mlp = None if moe else DenseFFN(hidden, shard.dense.width(config.intermediate_size))
        self.hidden, self.held, self.first_id, self.at_home = hidden, len(shard.experts), shard.first_id, shard.at_home

    def forward(self, hidden: Tensor, ids: Tensor | None, weights: Tensor | None) -> Tensor:
        """hidden [N, H], expert ids on the wire [N, K] of any integer dtype, weights [N, K]: this rank's partial sum [N, H]."""
        if self.mlp is not None:
            dense: Tensor = self.mlp(hidden)
            return dense
        if ids is None or weights is None or self.moe is None:
            raise ValueError("a layer with experts needs expert ids and weights")
        local = self._local(ids)
        partial: Tensor = self.moe(hidden, local, weights)
        if self.share_expert is None:
            return partial
        if self.at_home:
            rows = (local[:, 0] >= 0).nonzero().squeeze(1)
            partial = partial.index_add(0, rows, self.share_expert(hidden[rows]))
        else:
            partial = partial + self.share_expert(hidden)
        return partial

    def _local(self, ids: Tensor) -> Tensor:
        """Indices [N, K] into the experts held here; negative: held elsewhere."""
        local = ids.long() - self.first_id
        return local.masked_fill_(local >= self.held, -1)


class FFNHalf(nn.Module):
    """What an FFN actor holds: its shard of every layer's FFN. It keeps nothing between steps."""

    takes_narrow = False
    """Whether rows may come in 8 bits alone."""

    def __init__(self, config: ModelConfig, shard: FFNShard) -> None:
        super().__init__()
        self.config, self.shard = config, shard
        self.layers = nn.ModuleList(FFNLayer(config, i, shard) for i in range(config.num_hidden_layers))

    def forward(self, layer: int, routed: Routed) -> Tensor:
        """This rank's partial sum [N, H] for one layer; `routed.experts` are ids on the wire, of any integer dtype."""
        partial: Tensor = self.layers[layer](routed.hidden, routed.experts, routed.weights)
        return partial


class Step3Model(nn.Module):
    """Both halves in one process: the reference."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = AttentionHalf(config)
        self.ffn = FFNHalf(config, FFNShard.whole(config))

    def forward(self, token_ids: Tensor, cache: "list[tuple[Tensor, Tensor]] | None" = None) -> Tensor:
        """Logits [N, V] of the N tokens of one sequence that follow what `cache` holds; extends `cache` in place.

        `cache` is [(k [T, D], v [T, D])] a layer, or an empty list to begin one, or None to keep nothing.
        """
        start = cache[0][0].shape[0] if cache else 0
        residual = self.attention.embed_tokens(token_ids)
        cos, sin = self.attention.rotary(torch.arange(start, start + token_ids.shape[0], device=token_ids.device))
        for index in range(self.config.num_hidden_layers):
            layer = self.attention.layer(index)
            q, k, v = layer.before(residual, cos, sin)
            if cache is not None:
                if len(cache) > index:
                    k, v = torch.cat((cache[index][0], k)), torch.cat((cache[index][1], v))
                    cache[index] = (k, v)
                else:
                    cache.append((k, v))
            residual, routed = layer.after(residual, attend(q, k, v, start))
            residual = residual + self.ffn(index, routed)
        return self.attention.logits(residual)

    @torch.inference_mode()
    def generate_greedy(self, prompt: "list[int] | tuple[int, ...]", max_tokens: int, eos: "tuple[int, ...]" = ()) -> list[int]:
        """The most likely continuation of `prompt`, up to and including the first token of `eos`."""
        cache: list[tuple[Tensor, Tensor]] = []
        tokens: list[int] = []
        pending = torch.tensor(prompt)
        while len(tokens) < max_tokens:
            token = int(self(pending, cache)[-1].argmax())
            tokens.append(token)
            if token in eos:
                break
            pending = torch.tensor([token])
        return tokens
