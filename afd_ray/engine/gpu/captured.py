"""Steps that only decode, as replays over static tensors: a set of tensors for each slot, graphs for each slot and bucket of rows.

Nothing is added to the rows that pad a bucket, and what they give is not looked at.

Legend of shapes: B rows of a bucket, H hidden, K top-k, U FFN instances, V vocabulary.
"""

from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.passage import write_parts
from afd_ray.engine.gpu.static_step import INT, StaticStep, StepMemory, bucket_for, layer_of
from afd_ray.engine.gpu.step import describe
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.passage import Part
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels.gpu.capture import Capture, Run, buckets
from afd_ray.kernels.gpu.halves import Returned, head
from afd_ray.kernels.gpu.transfers import Spec, Staging, download, nbytes_of, views
from afd_ray.models.step3 import AttentionHalf, Narrow, Routed


class Static(NamedTuple):
    """What one slot's graphs of one bucket read and write: views of the slot's memory."""

    step: StaticStep
    places: Tensor  # [U, B] int32
    sums: Tensor  # [U * B, H]
    hidden: Tensor  # [B, H], for the shared expert and for an FFN on this device
    out: list[Tensor]
    """What goes to the host: hidden, or its values and exponents in e4m3, then expert ids [B, K] int32 and weights [B, K]."""


class Bucket(NamedTuple):
    static: Static
    begin: Run
    layers: list[Run]
    shares: list[Run | None]


class SlotGraphs:
    """One slot's memory, and its graphs by bucket."""

    def __init__(
        self, half: AttentionHalf, cache: PagedCache, needs: Needs, sizes: tuple[int, ...], capture: Capture, stays: bool
    ) -> None:
        self.half, self.cache, self._instances, self._capture, self.stays = half, cache, needs.instances, capture, stays
        config, device, most = half.config, cache.blocks.device, sizes[-1]
        self._narrow = layer_of(half, 0).scales is not None
        self.step = StepMemory(half, cache, most)
        self._hidden = torch.zeros(most, config.hidden_size, dtype=config.dtype, device=device)
        self.of_returned, self.of_out = (
            torch.zeros(nbytes_of(specs), dtype=torch.uint8, device=device)
            for specs in (self.returned(most, most * needs.instances), self._out(most))
        )
        self.buckets = {size: self._bucket(size) for size in sizes}

    def returned(self, rows: int, parts: int) -> list[Spec]:
        """Places, and the rows that parts come to in all."""
        return [(INT, (self._instances, rows)), (self.half.config.dtype, (parts, self.half.config.hidden_size))]

    def _out(self, rows: int) -> list[Spec]:
        config = self.half.config
        width, choice = config.hidden_size, (rows, config.moe_top_k)
        narrow = [(torch.float8_e4m3fn, (rows, width)), (torch.uint8, (rows, -(-width // 128)))]
        return [*(narrow if self._narrow else [(config.dtype, (rows, width))]), (INT, choice), (config.dtype, choice)]

    def _bucket(self, rows: int) -> Bucket:
        places, sums = views(self.of_returned, self.returned(rows, rows * self._instances))
        leaves = views(self.of_out, self._out(rows))
        hidden = self._hidden[:rows] if self._narrow else leaves[0]
        static = Static(self.step.of(rows), places, sums, hidden, leaves)
        static.places.fill_(-1)
        layers = range(self.half.config.num_hidden_layers)
        return Bucket(
            static,
            self._capture(lambda: self.step.begin(static.step)),
            [self._capture(self._attention(static, index)) for index in layers],
            [self._share(static, index) for index in layers],
        )

    def _attention(self, static: Static, index: int) -> Run:
        layer, blocks, residual = layer_of(self.half, index), self.cache.blocks[index], static.step.residual
        rows = self.step.rows(static.step)
        returned = Returned(static.sums, static.places) if index and self._instances else None

        def run() -> None:
            after, routed = layer(residual, returned, blocks, rows)
            residual.copy_(after)
            if routed.narrow is not None:
                static.hidden.copy_(routed.hidden)
            leaves = [routed.hidden] if routed.narrow is None else [*routed.narrow]
            for place, tensor in zip(static.out, [*leaves, routed.experts, routed.weights], strict=True):
                if tensor is not None:
                    place.copy_(tensor)

        return run

    def _share(self, static: Static, index: int) -> Run | None:
        layer = layer_of(self.half, index)

        def run() -> None:
            shared = layer.share(static.hidden)
            assert shared is not None
            static.step.residual.add_(shared)

        return None if layer.share_expert is None else self._capture(run)


class AttentionGraphs:
    """Of one attention rank."""

    def __init__(self, half: AttentionHalf, cache: PagedCache, needs: Needs, capture: Capture, *, stays: bool = False) -> None:
        """Captures them all; `half` is warmed up, `cache` has a spare block. `stays`: what the FFN returns is on the device."""
        self.needs, self._sizes = needs, buckets(needs.decoding)
        self._slots = [SlotGraphs(half, cache, needs, self._sizes, capture, stays) for _ in range(needs.slots)]

    def begin(self, slot: int, chunks: Many[Chunk]) -> "CapturedPassage | None":
        """None for a micro-batch with chunks of prompts, or with more rows than there are graphs for."""
        bucket = bucket_for(self._sizes, chunks)
        return None if bucket is None or slot >= len(self._slots) else CapturedPassage(self._slots[slot], bucket, chunks)


class CapturedPassage:
    """A `Passage` of rows that decode through the graphs of a slot; there is one at a time of a slot."""

    whole = False

    def __init__(self, graphs: SlotGraphs, bucket: int, chunks: Many[Chunk]) -> None:
        self._graphs, self._bucket, self._rows = graphs, graphs.buckets[bucket], len(chunks)
        self._static, self._is_returned = self._bucket.static, False
        described = describe(chunks, graphs.cache, graphs.half.config.num_attention_heads)
        self._samples = len(described.sample_rows)
        graphs.step.tell(self._static.step, described)
        self._bucket.begin()

    def attend(self, layer: int) -> Routed:
        if layer and not self._is_returned:
            self.add_parts(())
        self._is_returned = False
        self._bucket.layers[layer]()
        return self._routed(self._graphs.half.config.is_moe(layer), self._static.hidden, self._static.out, INT)

    def to_host(self, routed: Routed) -> Routed:
        """Waits for all that is launched so far."""
        out = self._graphs.of_out
        specs = [(tensor.dtype, tuple(tensor.shape)) for tensor in self._static.out]
        here = Staging(out.device, *specs).receive(out)
        return self._routed(routed.experts is not None, here[0], here, torch.int64)

    def share(self, layer: int, hidden: Tensor) -> None:
        share = self._bucket.shares[layer]
        if share is not None:
            share()

    def add(self, rows: Tensor) -> None:
        self._static.step.residual[: self._rows].add_(rows)

    def add_parts(self, parts: Many[Part]) -> None:
        graphs, count = self._graphs, sum(len(part.sums) for part in parts)
        if not len(self._static.places):
            return
        of_places, of_sums = graphs.returned(len(self._static.step.residual), count)
        staging = Staging(graphs.of_returned.device, of_places, *([] if graphs.stays else [of_sums]))
        places, sums = (*staging.tensors, self._static.sums)[:2]
        write_parts(parts, sums, places)
        staging.send_into(graphs.of_returned)
        self._is_returned = True

    def logits(self) -> Tensor:
        static = self._static
        rows = static.step.numbers.sample_rows[: self._samples]
        returned = None
        if self._is_returned:
            returned = Returned(static.sums, static.places.index_select(1, rows))
        return download([head(self._graphs.half, static.step.residual.index_select(0, rows), returned)])[0]

    def _routed(self, has_experts: bool, hidden: Tensor, out: Many[Tensor], ids: torch.dtype) -> Routed:
        """Of the rows that are somebody's."""
        *leaves, experts, weights = (tensor[: self._rows] for tensor in out)
        narrow = Narrow(*leaves) if len(leaves) > 1 else None
        if not has_experts:
            return Routed(hidden[: self._rows], None, None, narrow)
        return Routed(hidden[: self._rows], experts.to(ids), weights, narrow)
