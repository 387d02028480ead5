"""A micro-batch's rows on a GPU, from layer to layer without the host waiting; to and from the FFN through host memory, or by links between devices."""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from afd_ray.engine.gpu.step import describe, send
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.passage import Part
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels.gpu.halves import GPUAttentionLayer, Returned, head
from afd_ray.kernels.gpu.transfers import Staging, download
from afd_ray.models.step3 import AttentionHalf, Narrow, Routed


class GPUPassage:
    """A `Passage` through a half as `gpu_attention` gives it."""

    whole = False

    def __init__(
        self, half: AttentionHalf, cache: PagedCache, chunks: Many[Chunk], instances: int = 0, *, stays: bool = False
    ) -> None:
        """`instances`: of the FFN, at least so many are reckoned with, so that kernels are the same whoever returns rows.

        `stays`: what the FFN returns is on the device.
        """
        self._instances, self._stays = instances, stays
        self._half, self._cache, self._device = half, cache, cache.blocks.device
        self._step = send(describe(chunks, cache, half.config.num_attention_heads), half, self._device)
        self._residual: Tensor = half.embed_tokens(self._step.token_ids)  # [N, H]
        self._returned: Returned | None = None
        """Not added yet: the next norm does it."""

    def attend(self, layer: int) -> Routed:
        returned, self._returned = self._returned, None
        blocks = self._cache.blocks[layer]
        routed: Routed
        self._residual, routed = self._layer(layer)(self._residual, returned, blocks, self._step.rows)
        return routed

    def to_host(self, routed: Routed) -> Routed:
        """Waits for all that is launched so far."""
        rows: Many[Tensor] = routed.narrow or (routed.hidden,)
        choice = [tensor for tensor in (routed.experts, routed.weights) if tensor is not None]
        here = download([*rows, *choice])
        narrow = None if routed.narrow is None else Narrow(*here[:2])
        if not choice:
            return Routed(here[0], None, None, narrow)
        experts, weights = here[len(rows) :]
        return Routed(here[0], experts.long(), weights, narrow)

    def share(self, layer: int, hidden: Tensor) -> None:
        shared = self._layer(layer).share(hidden)
        if shared is not None:
            self.add(shared)

    def add(self, rows: Tensor) -> None:
        self._residual = self._residual + rows

    def add_parts(self, parts: Many[Part]) -> None:
        if not parts:
            return
        rows, width = self._residual.shape
        count, instances = sum(len(part.sums) for part in parts), max(self._instances, *(part.instance + 1 for part in parts))
        of_sums, of_places = (self._residual.dtype, (count, width)), (torch.int32, (instances, rows))
        if self._stays:
            sums, staging = self._residual.new_empty(count, width), Staging(self._device, of_places)
            write_parts(parts, sums, *staging.tensors)
            self._returned = Returned(sums, *staging.send())
        else:
            staging = Staging(self._device, of_sums, of_places)
            write_parts(parts, *staging.tensors)
            self._returned = Returned(*staging.send())

    def logits(self) -> Tensor:
        rows, returned = self._step.sample_rows, self._returned
        if returned is not None and returned.places is not None:
            returned = returned._replace(places=returned.places.index_select(1, rows))
        return download([head(self._half, self._residual.index_select(0, rows), returned)])[0]

    def _layer(self, index: int) -> GPUAttentionLayer:
        layer = self._half.layers[index]
        assert isinstance(layer, GPUAttentionLayer)
        return layer


def write_parts(parts: Many[Part], sums: Tensor, places: Tensor) -> None:
    """All parts one after the other into `sums` [R, H], and where an instance's part of a row lies there, or -1, into `places` [U, N] in host memory."""
    places.fill_(-1)
    first = 0
    for instance, rows, part in parts:
        end = first + len(part)
        sums[first:end] = part
        places[instance, rows] = torch.arange(first, end, dtype=torch.int32)
        first = end
