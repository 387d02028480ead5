"""Halves of the model on a GPU: layers that run by the kernels of this folder, products of 16 bits and more by torch's.

A layer is launches alone: it never waits for the device, and what it launches depends on counts of rows, not on what is computed.

Legend of shapes: N rows, H hidden, A heads, D head_dim, K top-k, U FFN instances, R partial rows, P blocks of the cache, T row tiles,
S rows that choose a token, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn

from afd_ray.kernels.gpu import decode_attention, prefill_attention
from afd_ray.kernels.gpu.expert_gemm import Experts, feed_every_row, feed_forward
from afd_ray.kernels.gpu.linear import Parts, joined, multiprocessors, product, rounded_product
from afd_ray.kernels.gpu.norm_quantise import Normalised, add_norm_quantise
from afd_ray.kernels.gpu.paged_softmax import Rows
from afd_ray.kernels.gpu.quantise_rows import dequantise_rows, quantise_rows, room
from afd_ray.kernels.gpu.rope_kv_write import rotate_and_write
from afd_ray.kernels.gpu.router import MOST_EXPERTS, route
from afd_ray.kernels.gpu.transfers import download, upload
from afd_ray.kernels.quantised import (
    QuantisedDense,
    QuantisedExperts,
    QuantisedLinear,
    quantise_attention,
    quantise_dense,
    quantise_experts,
)
from afd_ray.models.config import ModelConfig
from afd_ray.models.step3 import (
    AttentionHalf,
    AttentionLayer,
    CacheScales,
    DenseFFN,
    FFNHalf,
    FFNLayer,
    Linear,
    MultiMatrixFactorizationAttention,
    Narrow,
    Routed,
)
from afd_ray.models.step3 import Experts as RoutedExperts

WIDTH = 64
"""Hidden and intermediate dimensions of the experts are multiples of it."""


class StepRows(NamedTuple):
    """What a step's rows are to every attention layer, on the device: those that decode first, chunks of prompts behind them."""

    cos: Tensor  # [N, D / 2] float32
    sin: Tensor
    slots: Tensor  # [N] int32, where their keys and values go
    tables: Tensor  # [.] int32, block tables one after the other
    starts: Tensor  # [N] int32, where a row's table begins
    contexts: Tensor  # [N] int32, tokens that it attends to, itself included
    first_rows: Tensor  # [T] int32, of the chunks' tiles, counted from the first row that does not decode
    row_counts: Tensor  # [T] int32
    decoding: int
    """How many rows decode."""


class Returned(NamedTuple):
    """What the FFN returned for a layer, to be added in the order of the instances."""

    sums: Tensor  # [R, H], as they came; without places [U, N, H]
    places: Tensor | None = None  # [U, N] int32, where in `sums` an instance's part of a row is; -1: nowhere


class Projected(NamedTuple):
    """What attention starts from."""

    q: Tensor  # [N, A, D]
    k: Tensor | Parts  # [N, D]
    v: Tensor | Parts


class Projections(nn.Module):
    """Attention's products, of rows as the norm leaves them."""

    narrow = False
    """Whether rows are wanted in e4m3."""

    def __init__(self, attention: MultiMatrixFactorizationAttention) -> None:
        super().__init__()
        self.heads, self.dim = attention.heads, attention.head_dim
        self.latent_norm, self.epsilon = attention.inter_norm.weight, attention.inter_norm.eps
        self._take(attention)

    def _take(self, attention: MultiMatrixFactorizationAttention) -> None:
        self.q_proj, self.wq, self.o_proj = attention.q_proj, attention.wq, attention.o_proj
        self.kv_proj = _joined(attention.k_proj, attention.v_proj)

    def project(self, rows: Normalised) -> Projected:
        _, latent = add_and_normalise(self.q_proj(rows.hidden), None, self.latent_norm, self.epsilon)
        k, v = self.kv_proj(rows.hidden).chunk(2, dim=1)
        return Projected(self.wq(latent).view(-1, self.heads, self.dim), k, v)

    def out(self, attended: Tensor | Narrow) -> tuple[Tensor | None, Parts | None]:
        """What is attended [N, A, D] to what the residual still lacks: updates [1, N, H], or a product."""
        assert isinstance(attended, Tensor)
        return self.o_proj(attended.flatten(1))[None], None


class NarrowProjections(Projections):
    """In e4m3: three products, with norms that add up their parts and leave e4m3."""

    narrow = True

    def _take(self, attention: MultiMatrixFactorizationAttention) -> None:
        self.sizes = (attention.q_proj.weight.shape[0], self.dim)
        pairs = {name: _pair(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "wq", "o_proj")}
        self.qkv = joined([pairs["q_proj"], pairs["k_proj"], pairs["v_proj"]])
        self.wide_q, self.output = joined([pairs["wq"]]), joined([pairs["o_proj"]])
        for name, weight in (("qkv", self.qkv), ("wide_q", self.wide_q), ("output", self.output)):
            self.register_parameter(f"{name}_values", nn.Parameter(weight.values, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(weight.scales, requires_grad=False))

    def project(self, rows: Normalised) -> Projected:
        together, (latents, dim) = product(_narrow(rows), self.qkv), self.sizes
        latent = add_norm_quantise(None, None, self.latent_norm, self.epsilon, product=together.columns(0, latents))
        q = rounded_product(_narrow(latent), self.wide_q, rows.hidden.dtype)
        k, v = together.columns(latents, dim), together.columns(latents + dim, dim)
        return Projected(q.view(-1, self.heads, self.dim), k, v)

    def out(self, attended: Tensor | Narrow) -> tuple[Tensor | None, Parts | None]:
        """`attended` may be in e4m3 already, [N, A * D]."""
        rows = attended if isinstance(attended, Narrow) else quantise_rows(attended.flatten(1))
        return None, product(rows, self.output)


class GPUAttentionLayer(nn.Module):
    """`AttentionLayer` over the paged cache."""

    def __init__(self, plain: AttentionLayer, *, quantise: bool = False) -> None:
        """`quantise`: what goes to the FFN is given in e4m3 too. Projections that are quantised run in e4m3."""
        super().__init__()
        self.scales = "block" if quantise else None
        attention = plain.self_attn
        self.heads, self.dim, self.epsilon = attention.heads, attention.head_dim, plain.input_layernorm.eps
        self.top_k, self.normalise, self.cache_scales = plain.top_k, plain.normalise, attention.cache_scales
        self.input_norm, self.output_norm = plain.input_layernorm.weight, plain.post_attention_layernorm.weight
        is_narrow = isinstance(attention.q_proj, QuantisedLinear)
        self.projections = NarrowProjections(attention) if is_narrow else Projections(attention)
        self.gives_narrow = is_narrow and decode_attention.quantises_heads(self.dim)
        self.gate = None if plain.moe is None else plain.moe["gate"]
        self.share_expert = plain.share_expert

    def forward(self, residual: Tensor, returned: Returned | None, blocks: Tensor, rows: StepRows) -> tuple[Tensor, Routed]:
        """residual [N, H] and what is still to be added to it to the residual after attention, and the rows that go to the FFN.

        blocks [P, block_size, 2 * D] are the layer's, and get the rows' keys and values.
        """
        sums, places = (None, None) if returned is None else returned
        wanted = "block" if self.projections.narrow else None
        given = add_norm_quantise(residual, sums, self.input_norm, self.epsilon, places=places, scales=wanted)
        q, k, v = self.projections.project(given)
        rotate_and_write(q, k, v, rows.cos, rows.sin, rows.slots, blocks.flatten(0, 1), **self._scales(blocks))
        updates, parts = self.projections.out(self._attend(q, blocks, rows))
        normed = add_norm_quantise(given.residual, updates, self.output_norm, self.epsilon, product=parts, scales=self.scales)
        narrow = None if normed.values is None or normed.exponents is None else Narrow(normed.values, normed.exponents)
        if self.gate is None:
            return normed.residual, Routed(normed.hidden, None, None, narrow)
        hidden = normed.hidden
        choice = route(self.gate(hidden), self.top_k, self.normalise, hidden.dtype)
        return normed.residual, Routed(hidden, *choice, narrow)

    def share(self, hidden: Tensor) -> Tensor | None:
        """As `AttentionLayer.share`."""
        if isinstance(self.share_expert, QuantisedDense):
            return _dense(self.share_expert, quantise_rows(hidden)).to(hidden.dtype)
        return None if self.share_expert is None else self.share_expert(hidden)

    def _scales(self, blocks: Tensor) -> dict[str, float]:
        """Of e4m3 alone: all else is held as it is."""
        key, value = self.cache_scales if blocks.dtype == torch.float8_e4m3fn else CacheScales()
        return {"key_scale": key, "value_scale": value}

    def _attend(self, q: Tensor, blocks: Tensor, rows: StepRows) -> Tensor | Narrow:
        """[N, A, D], or [N, A * D] in e4m3; rows that decode and chunks of prompts take kernels of their own."""
        keys = blocks.view(*blocks.shape[:2], 1, 2, self.dim)
        firsts, others = slice(rows.decoding), slice(rows.decoding, None)
        decoding, chunked = (
            Rows(q[part], keys, rows.tables, rows.starts[part], rows.contexts[part]) for part in (firsts, others)
        )
        scales, splits = self._scales(blocks), _splits(len(decoding.q), self.heads, blocks)
        if self.gives_narrow:
            narrow = room(len(q), self.heads * self.dim, q.device)
            if len(decoding.q):
                decode_attention.attend_narrow(decoding, _of_rows(narrow, firsts), splits=splits, **scales)
            if len(chunked.q):
                attended = prefill_attention.attend_chunks(chunked, rows.first_rows, rows.row_counts, **scales)
                quantise_rows(attended.flatten(1), _of_rows(narrow, others))
            return narrow
        parts = []
        if len(decoding.q):
            parts.append(decode_attention.attend(decoding, splits=splits, **scales))
        if len(chunked.q):
            parts.append(prefill_attention.attend_chunks(chunked, rows.first_rows, rows.row_counts, **scales))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class GPUFFNLayer(FFNLayer):
    """`FFNLayer` over the same weights: the routed experts by the grouped products."""

    def __init__(self, plain: FFNLayer, dtype: torch.dtype) -> None:
        """`dtype`: of rows that are not in e4m3."""
        nn.Module.__init__(self)  # not the plain layer's, which would allocate its weights
        self.moe, self.share_expert, self.mlp = plain.moe, plain.share_expert, plain.mlp
        self.hidden, self.held, self.first_id, self.at_home = plain.hidden, plain.held, plain.first_id, plain.at_home
        self.dtype = dtype
        parts = [part for part in (plain.moe, plain.share_expert, plain.mlp) if part is not None]
        self.reads_wide = not all(isinstance(part, QuantisedExperts | QuantisedDense) for part in parts)
        self.reads_narrow = any(isinstance(part, QuantisedExperts | QuantisedDense) for part in parts)

    def forward(self, hidden: Tensor, ids: Tensor | None, weights: Tensor | None, narrow: Narrow | None = None) -> Tensor:
        """As `FFNLayer.forward`; ids [N, K] of any integer dtype. Of hidden and narrow one is made from the other where it is missing."""
        if narrow is not None and hidden.dtype == narrow.values.dtype and self.reads_wide:
            hidden = dequantise_rows(narrow, self.dtype)
        if narrow is None and self.reads_narrow:
            narrow = quantise_rows(hidden)
        if self.mlp is not None:
            return self._every(self.mlp, hidden, narrow, None).to(self.dtype)
        if ids is None or weights is None or self.moe is None:
            raise ValueError("a layer with experts needs expert ids and weights")
        total = self._routed(self.moe, hidden, ids, weights, narrow)
        if self.share_expert is not None:
            shared = self._shared_at_home if self.at_home else self._every
            total = shared(self.share_expert, hidden, narrow, ids, total)
        return total.to(self.dtype)

    def _routed(self, moe: RoutedExperts, hidden: Tensor, ids: Tensor, weights: Tensor, narrow: Narrow | None) -> Tensor:
        """[N, H] float32."""
        x, exponents = _operand(moe, hidden, narrow)
        return feed_forward(_stack(moe), x, ids, weights, first_id=self.first_id, exponents=exponents)

    def _every(
        self, dense: nn.Module, hidden: Tensor, narrow: Narrow | None, ids: Tensor | None, total: Tensor | None = None
    ) -> Tensor:
        """[N, H] of all rows, added to `total` where that is given."""
        if isinstance(dense, QuantisedDense):
            assert narrow is not None
            return _dense(dense, narrow, total)
        rows: Tensor = dense(hidden)
        return rows if total is None else total.add_(rows)

    def _shared_at_home(self, shared: nn.Module, hidden: Tensor, narrow: Narrow | None, ids: Tensor, total: Tensor) -> Tensor:
        """[N, H]: added to the rows whose first expert is held here.

        The shared expert is the only one of a product in groups, so that nobody has to count these rows.
        """
        local = ids[:, :1].int() - self.first_id
        chosen = torch.where((local >= 0) & (local < self.held), 0, -1)
        ones = torch.ones_like(chosen, dtype=self.dtype)
        if isinstance(shared, QuantisedDense):
            x, exponents = _operand(shared.expert, hidden, narrow)
            return feed_forward(_stack(shared.expert), x, chosen, ones, exponents=exponents, total=total)
        assert isinstance(shared, DenseFFN)
        one = Experts(shared.gate_proj.weight[None], shared.up_proj.weight[None], shared.down_proj.weight[None])
        return feed_forward(one, hidden, chosen, ones, total=total)


class GPUFFN(FFNHalf):
    """An FFN half on a GPU, for rows that are there too."""

    def __init__(self, half: FFNHalf) -> None:
        """Its layers are replaced in place."""
        nn.Module.__init__(self)
        self.config, self.shard, self.layers = half.config, half.shard, half.layers
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, FFNLayer)
            self.layers[index] = GPUFFNLayer(layer, half.config.dtype)

    def forward(self, layer: int, routed: Routed) -> Tensor:
        """As `FFNHalf.forward`."""
        partial: Tensor = self.layers[layer](*routed)
        return partial


class FedFFN(FFNHalf):
    """An FFN half on a GPU whose rows come from attention ranks and go back there."""

    takes_narrow = True

    def __init__(self, half: GPUFFN, device: torch.device, *, stays: bool = False) -> None:
        """`stays`: rows are on the device when they come and go; else in host memory."""
        nn.Module.__init__(self)
        self.config, self.shard, self.layers, self.device, self.stays = half.config, half.shard, half.layers, device, stays
        self.replayed: Callable[[int, Routed], Tensor | None] | None = None
        """Gives what `forward` does, for the rows that it takes."""

    @property
    def rows_from(self) -> torch.device:
        return self.device if self.stays else torch.device("cpu")

    def forward(self, layer: int, routed: Routed) -> Tensor:
        """As `FFNHalf.forward`; waits for the device unless rows stay there."""
        partial = self.replayed(layer, routed) if self.replayed is not None else None
        if partial is not None:
            return partial
        if self.stays:
            launched: Tensor = self.layers[layer](*routed)
            return launched
        return self._launched(layer, routed)

    def _launched(self, layer: int, routed: Routed) -> Tensor:
        rows: Sequence[Tensor] = routed.narrow or (routed.hidden,)
        choice = [tensor for tensor in (routed.experts, routed.weights) if tensor is not None]
        sent = upload([*rows, *choice], self.device)
        narrow = None if routed.narrow is None else Narrow(*sent[:2])
        ids, weights = (*sent[len(rows) :], None, None)[:2]
        return download([self.layers[layer](sent[0], ids, weights, narrow)])[0]


def add_and_normalise(residual: Tensor, returned: Returned | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """residual [N, H] with all that was returned added to it, and the norm of that."""
    sums, places = (None, None) if returned is None else returned
    result = add_norm_quantise(residual, sums, weight, epsilon, places=places, scales=None)
    return result.residual, result.hidden


def head(half: AttentionHalf, residual: Tensor, returned: Returned | None) -> Tensor:
    """Rows [S, H] after the last layer, with what was returned for them, to logits [S, V] float32."""
    _, hidden = add_and_normalise(residual, returned, half.norm.weight, half.norm.eps)
    logits: Tensor = half.lm_head(hidden)
    return logits.float()


def gpu_attention(
    half: AttentionHalf, device: torch.device, *, quantise: bool = False, projections: bool = False, dense: bool = False
) -> AttentionHalf:
    """The same half on the device, its layers replaced in place; raises ValueError in one line for a shape that the kernels do not take.

    To e4m3: `quantise`, what goes to the FFN; `projections`, attention's; `dense`, shared experts. What is quantised already stays so.
    """
    _check_attention(half.config)
    layers = [half.layer(index) for index in range(half.config.num_hidden_layers)]
    for layer in layers:
        if projections:
            quantise_attention(layer, device)
        if dense:
            quantise_dense(layer, device)
    half.to(device)
    for index, layer in enumerate(layers):
        half.layers[index] = GPUAttentionLayer(layer, quantise=quantise)
    return half


def gpu_ffn(half: FFNHalf, device: torch.device, *, quantise: bool = False, dense: bool = False) -> GPUFFN:
    """The half on the device, its layers replaced in place; raises ValueError in one line for a shape that the kernels do not take.

    To e4m3: `quantise`, the routed experts; `dense`, shared experts and dense layers. What is quantised already stays so.
    """
    _check_ffn(half)
    for layer in half.layers:
        assert isinstance(layer, FFNLayer)
        if quantise:
            quantise_experts(layer, device)
        if dense:
            quantise_dense(layer, device)
    return GPUFFN(half.to(device))


def _narrow(rows: Normalised) -> Narrow:
    assert rows.values is not None
    assert rows.exponents is not None
    return Narrow(rows.values, rows.exponents)


def _of_rows(narrow: Narrow, part: slice) -> Narrow:
    return Narrow(narrow.values[part], narrow.exponents[part])


def _pair(linear: Linear) -> tuple[Tensor, Tensor]:
    assert isinstance(linear, QuantisedLinear)
    return linear.weight, linear.scales


def _stack(moe: RoutedExperts) -> Experts:
    experts = Experts(moe.gate_proj, moe.up_proj, moe.down_proj)
    if isinstance(moe, QuantisedExperts):
        experts = Experts(*experts[:3], moe.gate_scales, moe.up_scales, moe.down_scales)
    return experts


def _operand(moe: RoutedExperts, hidden: Tensor, narrow: Narrow | None) -> tuple[Tensor, Tensor | None]:
    """The rows as the experts take them, and their exponents."""
    if not isinstance(moe, QuantisedExperts):
        return hidden, None
    assert narrow is not None
    return narrow


def _dense(dense: QuantisedDense, rows: Narrow, total: Tensor | None = None) -> Tensor:
    """[N, H] float32, added to `total` where that is given."""
    return feed_every_row(_stack(dense.expert), rows.values, exponents=rows.exponents, total=total)


def _joined(*linears: Linear) -> Linear:
    """One product instead of several with the same input, their outputs side by side."""
    weight = torch.cat([linear.weight for linear in linears])
    with torch.device("meta"):
        joined = Linear(*weight.shape)
    joined.weight = nn.Parameter(weight, requires_grad=False)
    return joined


def decoding_counts(heads: int, blocks: Tensor, most: int) -> list[int]:
    """Numbers of rows whose decode attention over `blocks` needs, between them, every kernel that any number up to `most` does."""
    kinds: dict[int, int] = {}
    for count in range(1, most + 1):
        kinds.setdefault(decode_attention.padded(_splits(count, heads, blocks)), count)
    return list(kinds.values())


def _splits(count: int, heads: int, blocks: Tensor) -> int:
    tiles = triton.cdiv(heads, decode_attention.TILES[blocks.dtype].queries)
    return decode_attention.splits_for(count * tiles, multiprocessors(blocks.device))


def _check_attention(config: ModelConfig) -> None:
    if config.head_dim < 16 or config.head_dim & config.head_dim - 1:
        raise ValueError(f"head_dim: must be a power of two, at least 16, for the GPU kernels, got {config.head_dim}")
    if config.moe_num_experts > MOST_EXPERTS:
        raise ValueError(f"moe_num_experts: must be at most {MOST_EXPERTS} for the GPU kernels, got {config.moe_num_experts}")


def _check_ffn(half: FFNHalf) -> None:
    config, shard = half.config, half.shard
    widths = {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": shard.routed.width(config.moe_intermediate_size),
    }
    if shard.at_home:
        widths["share_expert_dim"] = shard.dense.width(config.share_expert_dim)
    for name, width in widths.items():
        if width % WIDTH:
            raise ValueError(f"{name}: what one rank holds of it must be a multiple of {WIDTH} for the GPU kernels, got {width}")
