"""What a step tells the device: one buffer of whole numbers a micro-batch, the same for every layer.

Legend of shapes: N rows, S rows that choose a token, T row tiles.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afd_ray.engine.kv_cache import PagedCache, slot_indices
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels.gpu.halves import StepRows
from afd_ray.kernels.gpu.prefill_attention import row_tiles
from afd_ray.kernels.gpu.transfers import upload
from afd_ray.models.step3 import AttentionHalf

Numbers = NDArray[np.int32]


class Described(NamedTuple):
    """A micro-batch in host memory. Chunks of one row come first, so that rows that decode lie together; the others follow."""

    token_ids: Numbers  # [N]
    positions: Numbers  # [N]
    slots: Numbers  # [N], where keys and values go
    starts: Numbers  # [N], where a row's block table begins
    sample_rows: Numbers  # [S], the rows whose logits choose a token, in the order of the chunks as they were given
    tables: Numbers  # [.], the chunks' block tables one after the other
    first_rows: Numbers  # [T], of the tiles of chunks, counted from the first row that does not decode
    row_counts: Numbers  # [T]
    decoding: int
    """Chunks of one row."""


class Step(NamedTuple):
    """The same on the device."""

    token_ids: Tensor  # [N] int32
    sample_rows: Tensor  # [S] int32
    rows: StepRows


def describe(chunks: Many[Chunk], cache: PagedCache, heads: int) -> Described:
    """`heads`: that query the cache's one key head. At least one chunk."""
    order = sorted(range(len(chunks)), key=lambda index: chunks[index].count > 1)
    ordered = [chunks[index] for index in order]
    ends = list(accumulate(chunk.count for chunk in ordered))
    last_rows = dict(zip(order, (end - 1 for end in ends), strict=True))
    tables = [chunk.sequence.block_table for chunk in ordered]
    table_starts = accumulate(map(len, tables[:-1]), initial=0)
    tiles = row_tiles([chunk.count for chunk in ordered if chunk.count > 1], heads, 1, cache.dtype)
    slots = (slot_indices(chunk.sequence.block_table, chunk.start, chunk.count, cache.block_size) for chunk in ordered)
    return Described(
        token_ids=_numbers(chain.from_iterable(chunk.token_ids for chunk in ordered)),
        positions=_numbers(chain.from_iterable(chunk.positions for chunk in ordered)),
        slots=_numbers(chain.from_iterable(slots)),
        starts=np.repeat(_numbers(table_starts), [chunk.count for chunk in ordered]),
        sample_rows=_numbers(last_rows[index] for index, chunk in enumerate(chunks) if chunk.samples),
        tables=_numbers(chain.from_iterable(tables)),
        first_rows=_numbers(tiles.first_rows),
        row_counts=_numbers(tiles.row_counts),
        decoding=sum(chunk.count == 1 for chunk in ordered),
    )


def padding(cache: PagedCache, decoding: int, chunks: int = 0) -> Described:
    """Rows of no sequence, in the cache's first spare block: so many that decode, then so many prompts of one row. Each attends to one token."""
    rows = decoding + chunks
    zeros, block = np.zeros(rows, dtype=np.int32), np.full(1, cache.num_blocks, dtype=np.int32)
    return Described(
        token_ids=zeros,
        positions=zeros,
        slots=np.full(rows, cache.num_blocks * cache.block_size, dtype=np.int32),
        starts=zeros,
        sample_rows=zeros[:1],
        tables=block,
        first_rows=np.arange(chunks, dtype=np.int32),
        row_counts=np.ones(chunks, dtype=np.int32),
        decoding=decoding,
    )


def send(described: Described, half: AttentionHalf, device: torch.device) -> Step:
    """Onto the device in one copy that the host does not wait for; cos and sin are computed there."""
    *numbers, decoding = described
    sent = upload([torch.from_numpy(each) for each in numbers], device)
    token_ids, positions, slots, starts, sample_rows, tables, first_rows, row_counts = sent
    cos, sin = half.rotary(positions)
    rows = StepRows(cos, sin, slots, tables, starts, positions + 1, first_rows, row_counts, decoding)
    return Step(token_ids, sample_rows, rows)


def _numbers(values: Iterable[int]) -> Numbers:
    return np.fromiter(values, dtype=np.int32)
