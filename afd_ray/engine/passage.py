"""A micro-batch's way through an attention half: its rows, wherever they lie, from the tokens to the logits.

Legend of shapes: N rows, H hidden, K top-k, S rows that choose a token, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.paged_attention import attend_paged, plan_attention
from afd_ray.engine.sequence import Chunk
from afd_ray.models.step3 import AttentionHalf, Routed


class Part(NamedTuple):
    """Partial sums of some rows, as one FFN rank returned them."""

    instance: int
    """Of the FFN; each row has at most one part from each."""
    rows: slice | Tensor
    """Which of the micro-batch's."""
    sums: Tensor
    """[n, H], where the links have brought it, valid only until it is handed over."""


class Passage(Protocol):
    """One micro-batch's rows. Layers are called in their order, each with what came back from the one before added."""

    whole: bool
    """Whether it goes through all layers by itself, the FFN's too, once it is begun: then only its logits are asked for."""

    def attend(self, layer: int) -> Routed:
        """All of an attention layer, the rows' keys and values written into the cache; what goes to the FFN lies where the half computes."""

    def to_host(self, routed: Routed) -> Routed:
        """The same in host memory, experts as int64; of rows that are there in 8 bits too only these."""

    def share(self, layer: int, hidden: Tensor) -> None:
        """Add the shared expert of what `attend` gave, where attention ranks compute it."""

    def add(self, rows: Tensor) -> None:
        """Add [N, H] that lie where the half computes."""

    def add_parts(self, parts: Many[Part]) -> None:
        """Add what the FFN ranks returned, in this order; none of its tensors is read after the call."""

    def logits(self) -> Tensor:
        """[S, V] float32 in host memory, after the last layer, in the order of the chunks that choose a token."""


Begin = Callable[[AttentionHalf, PagedCache, Many[Chunk], int], Passage]
"""Takes the half, the cache, a micro-batch's chunks and its slot."""


class HostPassage:
    """In host memory, by the half's own modules, plain or packed."""

    whole = False

    def __init__(self, half: AttentionHalf, cache: PagedCache, chunks: Many[Chunk], slot: int = 0) -> None:
        """In any slot."""
        self._half, self._cache, self._plan = half, cache, plan_attention(chunks, cache)
        self._residual: Tensor = half.embed_tokens(self._plan.token_ids)  # [N, H]
        self._rotary = half.rotary(self._plan.positions)

    def attend(self, layer: int) -> Routed:
        module = self._half.layer(layer)
        q, k, v = module.before(self._residual, *self._rotary)
        self._cache.write(layer, self._plan.slots, k, v)
        context = attend_paged(self._cache, layer, self._plan, q)
        self._residual, routed = module.after(self._residual, context)
        return routed

    def to_host(self, routed: Routed) -> Routed:
        return routed

    def share(self, layer: int, hidden: Tensor) -> None:
        shared = self._half.layer(layer).share(hidden)
        if shared is not None:
            self._residual += shared

    def add(self, rows: Tensor) -> None:
        self._residual += rows

    def add_parts(self, parts: Many[Part]) -> None:
        for _, rows, sums in parts:
            if isinstance(rows, slice):
                self._residual[rows] += sums.to(self._residual.dtype)
            else:
                self._residual.index_add_(0, rows, sums.to(self._residual.dtype))

    def logits(self) -> Tensor:
        return self._half.logits(self._residual[self._plan.sample_rows]).to(torch.float32)
