"""What a step that only decodes is to the graphs that replay it: tensors that stay where they are, for each slot, at the sizes of buckets.

Rows that pad a bucket belong to nobody: they attend to nothing, and their keys and values go to the cache's spare block.

Legend of shapes: B rows of a bucket, H hidden, D head_dim, S rows that choose a token.
"""

from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afd_ray.engine.gpu.step import Described
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels.gpu.halves import GPUAttentionLayer, StepRows
from afd_ray.kernels.gpu.transfers import Spec, Staging, nbytes_of, views
from afd_ray.models.step3 import AttentionHalf

INT = torch.int32
_NONE = np.empty(0, dtype=np.int32)
_NOTHING = Described(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, decoding=0)
"""A step without a row."""


class Numbers(NamedTuple):
    """What a step tells the device, at a bucket's size; the tables lie last, for of them only what is used is sent."""

    token_ids: Tensor  # [B] int32
    positions: Tensor  # [B]; -1: padding
    slots: Tensor  # [B]
    starts: Tensor  # [B]
    sample_rows: Tensor  # [B], of which S count
    tables: Tensor  # [.]


class StaticStep(NamedTuple):
    """A bucket's views of its slot's memory."""

    numbers: Numbers
    residual: Tensor  # [B, H]
    cos: Tensor  # [B, D / 2]
    sin: Tensor
    contexts: Tensor  # [B] int32


class StepMemory:
    """Of one slot."""

    def __init__(self, half: AttentionHalf, cache: PagedCache, most: int) -> None:
        """`most`: rows of the largest bucket."""
        config, device = half.config, cache.blocks.device
        self._half, self._cache = half, cache
        self._told = torch.zeros(nbytes_of(self._numbers(most, cache.num_blocks + 1)), dtype=torch.uint8, device=device)
        self._residual = torch.zeros(most, config.hidden_size, dtype=config.dtype, device=device)
        self._cos = torch.zeros(most, config.head_dim // 2, device=device)
        self._sin = torch.zeros_like(self._cos)
        self._contexts = torch.zeros(most, dtype=INT, device=device)

    def of(self, rows: int) -> StaticStep:
        """The bucket's, told of a step without a row."""
        numbers = Numbers(*views(self._told, self._numbers(rows, self._cache.num_blocks + 1)))
        static = StaticStep(numbers, self._residual[:rows], self._cos[:rows], self._sin[:rows], self._contexts[:rows])
        self.tell(static, _NOTHING)
        return static

    def tell(self, static: StaticStep, described: Described) -> None:
        """Onto the device: rows that decode, padded."""
        staging = Staging(self._told.device, *self._numbers(len(static.residual), max(1, len(described.tables))))
        token_ids, positions, slots, starts, sample_rows, tables = staging.tensors
        nowhere = self._cache.num_blocks * self._cache.block_size
        padding = ((token_ids, 0), (positions, -1), (slots, nowhere), (starts, 0))
        given = (described.token_ids, described.positions, described.slots, described.starts)
        for (tensor, filler), values in zip(padding, given, strict=True):
            tensor[: len(values)] = torch.from_numpy(values)
            tensor[len(values) :] = filler
        sample_rows[: len(described.sample_rows)] = torch.from_numpy(described.sample_rows)
        tables[: len(described.tables)] = torch.from_numpy(described.tables)
        staging.send_into(self._told)

    def begin(self, static: StaticStep) -> None:
        """Launch what comes before the first layer: embedding, rotary table, contexts."""
        numbers = static.numbers
        static.residual.copy_(self._half.embed_tokens(numbers.token_ids))
        for place, tensor in zip((static.cos, static.sin), self._half.rotary(numbers.positions), strict=True):
            place.copy_(tensor)
        torch.add(numbers.positions, 1, out=static.contexts)

    @staticmethod
    def rows(static: StaticStep) -> StepRows:
        """As layers take them."""
        numbers, none = static.numbers, torch.empty(0, dtype=INT, device=static.residual.device)
        told = numbers.slots, numbers.tables, numbers.starts, static.contexts
        return StepRows(static.cos, static.sin, *told, none, none, len(static.residual))

    @staticmethod
    def _numbers(rows: int, blocks: int) -> list[Spec]:
        """Of `Numbers`."""
        return [*[(INT, (rows,))] * 5, (INT, (blocks,))]


def bucket_for(sizes: tuple[int, ...], chunks: Many[Chunk]) -> int | None:
    """The smallest that takes them; None for chunks of prompts, and for more rows than any does."""
    rows = len(chunks)
    if rows > sizes[-1] or any(chunk.count > 1 for chunk in chunks):
        return None
    return next(size for size in sizes if size >= rows)


def layer_of(half: AttentionHalf, index: int) -> GPUAttentionLayer:
    layer = half.layers[index]
    assert isinstance(layer, GPUAttentionLayer)
    return layer
