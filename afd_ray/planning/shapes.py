"""A model by its sizes: what a decoded token moves and computes in each kind of layer (arXiv:2507.19427 section 4.1).

Conventions of that section: a multiply-add is two FLOP; embedding, head, router and norms are left out; weights have 8 bits.
"""

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

WEIGHT_BYTES = 1
EMBEDDING_BYTES = 2
"""Embedding and head stay bf16."""

CacheBytes = Literal[1, 2, 4]


class Record(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionLayers(Record):
    """`layers` equal attention layers. Everything is for one of them."""

    layers: PositiveInt
    heads: PositiveInt
    cache_bytes: CacheBytes
    """For each value of the cache."""

    @abstractmethod
    def cache_values(self, context: int) -> int:
        """Values cached for a sequence of `context` tokens."""

    @abstractmethod
    def flops(self, context: int) -> int:
        """Of attention itself, for a token after `context` others."""

    @abstractmethod
    def output_parameters(self, hidden: int) -> int:
        """Of the projection back to the residual."""

    @abstractmethod
    def input_parameters(self, hidden: int) -> int:
        """Of all other projections."""

    def linear_parameters(self, hidden: int) -> int:
        """Of all projections."""
        return self.input_parameters(hidden) + self.output_parameters(hidden)

    def held_bytes(self, context: int) -> int:
        """What a sequence takes of memory."""
        return self.cache_values(context) * self.cache_bytes

    def moved_bytes(self, context: int) -> int:
        """What a decoded token moves of its cache: all of it is read."""
        return self.held_bytes(context)


class Grouped(AttentionLayers):
    """Grouped-query attention; with a `window`, over the last tokens alone."""

    kind: Literal["gqa"] = "gqa"
    kv_heads: PositiveInt
    head_dim: PositiveInt
    window: PositiveInt | None = None

    def _seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)

    def cache_values(self, context: int) -> int:
        return 2 * self.kv_heads * self.head_dim * self._seen(context)

    def flops(self, context: int) -> int:
        return 4 * self.heads * self.head_dim * self._seen(context)

    def output_parameters(self, hidden: int) -> int:
        return self.heads * self.head_dim * hidden

    def input_parameters(self, hidden: int) -> int:
        return hidden * (self.heads + 2 * self.kv_heads) * self.head_dim


class Factorised(AttentionLayers):
    """Multi-matrix factorisation attention: queries through a low rank, one key head and one value head for all."""

    kind: Literal["mfa"] = "mfa"
    head_dim: PositiveInt
    query_rank: PositiveInt

    def cache_values(self, context: int) -> int:
        return 2 * self.head_dim * context

    def flops(self, context: int) -> int:
        return 4 * self.heads * self.head_dim * context

    def output_parameters(self, hidden: int) -> int:
        return self.heads * self.head_dim * hidden

    def input_parameters(self, hidden: int) -> int:
        return hidden * (self.query_rank + 2 * self.head_dim) + self.query_rank * self.heads * self.head_dim


class Latent(AttentionLayers):
    """Multi-head latent attention, decoded against the latent itself.

    The paper counts the values as wide as the keys, rotary part included, and the projections as if not absorbed.
    """

    kind: Literal["mla"] = "mla"
    latent: PositiveInt
    rope: PositiveInt
    """Rotary part of keys and queries; the other part is `nope`."""
    nope: PositiveInt
    value: PositiveInt
    query_rank: PositiveInt

    def cache_values(self, context: int) -> int:
        return (self.latent + self.rope) * context

    def flops(self, context: int) -> int:
        return 4 * self.heads * (self.latent + self.rope) * context

    def output_parameters(self, hidden: int) -> int:
        return self.heads * self.value * hidden

    def input_parameters(self, hidden: int) -> int:
        queries = self.query_rank * (hidden + self.heads * (self.nope + self.rope))
        return queries + hidden * (self.latent + self.rope) + self.latent * self.heads * (self.nope + self.value)


class Linear(AttentionLayers):
    """Linear attention with an output gate: a state of head_dim x head_dim for each head, whatever the context.

    A token decays the state, forms k v, adds it, and multiplies and sums along the query: five operations a value, each
    counted as a multiply-add, which is what the paper's Table 2 implies. The state is read and written.
    """

    kind: Literal["linear"] = "linear"
    head_dim: PositiveInt

    def cache_values(self, context: int) -> int:
        return self.heads * self.head_dim**2

    def moved_bytes(self, context: int) -> int:
        return 2 * self.held_bytes(context)

    def flops(self, context: int) -> int:
        return 5 * 2 * self.heads * self.head_dim**2

    def output_parameters(self, hidden: int) -> int:
        return self.heads * self.head_dim * hidden

    def input_parameters(self, hidden: int) -> int:
        return 4 * self.heads * self.head_dim * hidden


class FfnLayers(Record):
    """`layers` equal FFN layers of SwiGLU."""

    layers: PositiveInt

    @abstractmethod
    def parameters(self, hidden: int) -> int:
        """Of one layer."""

    @abstractmethod
    def active_parameters(self, hidden: int) -> int:
        """Of one layer, those that a token meets."""


class Experts(FfnLayers):
    """Experts, `top_k` of them and the shared one for each token."""

    kind: Literal["moe"] = "moe"
    experts: PositiveInt
    top_k: PositiveInt
    width: PositiveInt
    shared_width: Annotated[int, Field(ge=0)] = 0

    def parameters(self, hidden: int) -> int:
        return 3 * hidden * (self.experts * self.width + self.shared_width)

    def active_parameters(self, hidden: int) -> int:
        return 3 * hidden * (self.top_k * self.width + self.shared_width)


class Dense(FfnLayers):
    """One FFN for all tokens."""

    kind: Literal["dense"] = "dense"
    width: PositiveInt

    def parameters(self, hidden: int) -> int:
        return 3 * hidden * self.width

    def active_parameters(self, hidden: int) -> int:
        return self.parameters(hidden)


AnyAttention = Annotated[Grouped | Factorised | Latent | Linear, Field(discriminator="kind")]
AnyFfn = Annotated[Experts | Dense, Field(discriminator="kind")]


class ModelShape(Record):
    """A model's layers by kind."""

    name: str
    source: str
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    attention: tuple[AnyAttention, ...]
    ffn: tuple[AnyFfn, ...]

    @model_validator(mode="after")
    def _layers_agree(self) -> "ModelShape":
        attention, ffn = (sum(group.layers for group in side) for side in (self.attention, self.ffn))
        if attention != ffn:
            raise ValueError(f"{self.name}: {attention} attention layers but {ffn} FFN layers")
        return self

    @property
    def layers(self) -> int:
        return sum(group.layers for group in self.attention)

    def with_cache_bytes(self, cache_bytes: CacheBytes) -> "ModelShape":
        """The same with keys and values in another precision; the state of linear attention stays float32."""
        changed = tuple(
            group if isinstance(group, Linear) else group.model_copy(update={"cache_bytes": cache_bytes})
            for group in self.attention
        )
        return self.model_copy(update={"attention": changed})

    def moved_bytes(self, context: int) -> int:
        """Bytes of cache that a decoded token moves."""
        return sum(group.layers * group.moved_bytes(context) for group in self.attention)

    def held_bytes(self, context: int) -> int:
        """Bytes of cache that a sequence takes."""
        return sum(group.layers * group.held_bytes(context) for group in self.attention)

    def attention_flops(self, context: int) -> int:
        return sum(group.layers * group.flops(context) for group in self.attention)

    @property
    def linear_parameters(self) -> int:
        """Of attention's projections."""
        return sum(group.layers * group.linear_parameters(self.hidden_size) for group in self.attention)

    @property
    def linear_flops(self) -> int:
        return 2 * self.linear_parameters

    @property
    def ffn_parameters(self) -> int:
        return sum(group.layers * group.parameters(self.hidden_size) for group in self.ffn)

    @property
    def ffn_flops(self) -> int:
        return 2 * sum(group.layers * group.active_parameters(self.hidden_size) for group in self.ffn)

    @property
    def attention_side_bytes(self) -> int:
        """Weights that every attention rank holds: projections, embedding and head."""
        return self.linear_parameters * WEIGHT_BYTES + 2 * self.vocab_size * self.hidden_size * EMBEDDING_BYTES

    @property
    def ffn_side_bytes(self) -> int:
        """Weights that the FFN ranks hold together."""
        return self.ffn_parameters * WEIGHT_BYTES

    @property
    def fewest_experts(self) -> int | None:
        """Of the layers that have any: no more instances can share them."""
        return min((group.experts for group in self.ffn if isinstance(group, Experts)), default=None)
