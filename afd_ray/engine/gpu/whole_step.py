"""Steps that only decode where one actor computes both halves: all layers are one graph, so the host launches a step, not a layer.

Legend of shapes: B rows of a bucket, H hidden.
"""

from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.static_step import StaticStep, StepMemory, bucket_for, layer_of
from afd_ray.engine.gpu.step import describe
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.passage import Part
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels.gpu.capture import Capture, Run, buckets
from afd_ray.kernels.gpu.halves import Returned, head
from afd_ray.kernels.gpu.transfers import download
from afd_ray.models.step3 import AttentionHalf, FFNHalf, Routed


class Bucket(NamedTuple):
    static: StaticStep
    layers: Run
    """All of them, from the tokens to the residual behind the last one."""


class SlotSteps:
    """One slot's memory, and its graphs by bucket."""

    def __init__(self, half: AttentionHalf, ffn: FFNHalf, cache: PagedCache, sizes: tuple[int, ...], capture: Capture) -> None:
        self.half, self._ffn, self.cache = half, ffn, cache
        self.memory = StepMemory(half, cache, sizes[-1])
        self.buckets = {size: self._bucket(self.memory.of(size), capture) for size in sizes}

    def _bucket(self, static: StaticStep, capture: Capture) -> Bucket:
        return Bucket(static, capture(lambda: self._launch(static)))

    def _launch(self, static: StaticStep) -> None:
        self.memory.begin(static)
        rows, residual, returned = self.memory.rows(static), static.residual, None
        for index in range(self.half.config.num_hidden_layers):
            layer = layer_of(self.half, index)
            residual, routed = layer(residual, returned, self.cache.blocks[index], rows)
            shared, partial = layer.share(routed.hidden), self._ffn(index, routed)
            residual = residual if shared is None else residual + shared
            returned = Returned(partial[None])  # the next norm adds it
        torch.add(residual, partial, out=static.residual)


class WholeSteps:
    """Of one rank that holds every expert."""

    def __init__(
        self,
        half: AttentionHalf,
        ffn: FFNHalf,
        cache: PagedCache,
        needs: Needs,
        capture: Capture,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        """Captures them all; both halves are warmed up and take rows where they lie, `cache` has a spare block.

        `sizes`: of the buckets; None: all that may come.
        """
        self.needs, self._sizes = needs, sizes or buckets(needs.decoding)
        self._slots = [SlotSteps(half, ffn, cache, self._sizes, capture) for _ in range(needs.slots)]

    def begin(self, slot: int, chunks: Many[Chunk]) -> "WholePassage | None":
        """None for a micro-batch with chunks of prompts, or with more rows than there are graphs for."""
        bucket = bucket_for(self._sizes, chunks)
        return None if bucket is None or slot >= len(self._slots) else WholePassage(self._slots[slot], bucket, chunks)


class WholePassage:
    """A `Passage` that is through all layers, or on its way there, as soon as it is begun; there is one at a time of a slot."""

    whole = True

    def __init__(self, steps: SlotSteps, bucket: int, chunks: Many[Chunk]) -> None:
        self._half, (self._static, self.launch) = steps.half, steps.buckets[bucket]
        described = describe(chunks, steps.cache, steps.half.config.num_attention_heads)
        self._samples = len(described.sample_rows)
        steps.memory.tell(self._static, described)
        self.launch()

    def attend(self, layer: int) -> Routed:
        raise RuntimeError("all layers are one graph")

    def to_host(self, routed: Routed) -> Routed:
        raise RuntimeError("all layers are one graph")

    def share(self, layer: int, hidden: Tensor) -> None:
        """Done."""

    def add(self, rows: Tensor) -> None:
        raise RuntimeError("all layers are one graph")

    def add_parts(self, parts: Many[Part]) -> None:
        """There are none."""

    def logits(self) -> Tensor:
        rows = self._static.numbers.sample_rows[: self._samples]
        return download([head(self._half, self._static.residual.index_select(0, rows), None)])[0]
