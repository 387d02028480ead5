"""Attention over the paged cache: everything that does not depend on the layer is planned once a micro-batch.

Legend of shapes: N rows, A heads, D head_dim, G rows of a group, T keys (padded to whole blocks), B blocks of a sequence.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.engine.kv_cache import PagedCache, slot_indices
from afd_ray.engine.sequence import Chunk
from afd_ray.kernels import native

# Keys and values gathered at a time. Larger groups save calls, but their copy falls out of the CPU's cache before it is used.
GROUP_BYTES = 2 << 20
# Share of a group's keys that may be padding.
GROUP_PADDING = 0.25


class SingleRows(NamedTuple):
    """Chunks of one row, of similar context length, computed together."""

    rows: Tensor  # [G]
    blocks: Tensor  # [G * B], each row's table padded with its own last block
    mask: Tensor  # [G, 1, 1, T], 0 or -inf


class ManyRows(NamedTuple):
    """One chunk of several rows."""

    rows: slice
    context: int
    blocks: Tensor  # [B]
    mask: Tensor | None  # [N, T], 0 or -inf; None: plainly causal, it begins at position 0


class Gathered(NamedTuple):
    """The rows' keys and values are copied together, group by group."""

    singles: tuple[SingleRows, ...]
    chunks: tuple[ManyRows, ...]
    scratch: Tensor  # [blocks of the largest group, block_size, 2 * D]


class InPlace(NamedTuple):
    """Every row reads its blocks where they lie: the compiled kernel's way."""

    tables: Tensor  # [.] int32, the chunks' block tables one after the other
    starts: Tensor  # [N] int32, where a row's table begins
    contexts: Tensor  # [N] int32, tokens it may attend to
    longest: int


class AttentionPlan(NamedTuple):
    """Where a micro-batch's rows are, and what each may attend to; the same for every layer."""

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    slots: Tensor  # [N] int64, where their keys and values go
    sample_rows: Tensor  # [S] int64, the rows whose logits choose a token, one a sampling chunk, in order
    keys: Gathered | InPlace


def plan_attention(chunks: Many[Chunk], cache: PagedCache) -> AttentionPlan:
    """Plan the rows of a micro-batch, chunk after chunk; at least one chunk."""
    size = cache.block_size
    ends = list(accumulate(chunk.count for chunk in chunks))
    positions = torch.tensor([position for chunk in chunks for position in chunk.positions])
    slots = [slot for chunk in chunks for slot in slot_indices(chunk.sequence.block_table, chunk.start, chunk.count, size)]
    return AttentionPlan(
        token_ids=torch.tensor([token for chunk in chunks for token in chunk.token_ids]),
        positions=positions,
        slots=torch.tensor(slots),
        sample_rows=torch.tensor([end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.samples], dtype=torch.int64),
        keys=_in_place(chunks, positions) if _reads_in_place(cache) else _gathered(chunks, ends, cache),
    )


def attend_paged(cache: PagedCache, layer: int, plan: AttentionPlan, q: Tensor) -> Tensor:
    """Causal attention of rotated q [N, A, D] over what the cache holds of each row's sequence, that row included: [N, A, D]."""
    keys = plan.keys
    if isinstance(keys, InPlace):
        return native.attend(q.to(cache.dtype), cache.blocks[layer], *keys).to(q.dtype)
    out = torch.empty_like(q)
    for group in keys.singles:
        out[group.rows] = _attend_singles(cache, layer, group, q[group.rows], keys.scratch)
    for chunk in keys.chunks:
        out[chunk.rows] = _attend_many(cache, layer, chunk, q[chunk.rows], keys.scratch)
    return out


def _reads_in_place(cache: PagedCache) -> bool:
    return cache.dtype == torch.bfloat16 and cache.head_dim % native.WIDTH == 0 and native.available()


def _in_place(chunks: Many[Chunk], positions: Tensor) -> InPlace:
    tables = [chunk.sequence.block_table for chunk in chunks]
    ends = list(accumulate(map(len, tables)))
    starts = [end - len(table) for end, table, chunk in zip(ends, tables, chunks, strict=True) for _ in range(chunk.count)]
    blocks = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=ends[-1])
    contexts = positions.int() + 1
    return InPlace(torch.from_numpy(blocks), torch.tensor(starts, dtype=torch.int32), contexts, int(contexts.max()))


def _gathered(chunks: Many[Chunk], ends: list[int], cache: PagedCache) -> Gathered:
    placed = [(end - chunk.count, chunk) for end, chunk in zip(ends, chunks, strict=True)]  # (first row, chunk)
    groups = _similar([(row, chunk) for row, chunk in placed if chunk.count == 1], cache)
    singles = tuple(_plan_singles(group, cache) for group in groups)
    many = tuple(_plan_many(row, chunk, cache) for row, chunk in placed if chunk.count > 1)
    largest = max([group.blocks.numel() for group in singles] + [part.blocks.numel() for part in many])
    return Gathered(singles, many, torch.empty(largest, cache.block_size, 2 * cache.head_dim, dtype=cache.dtype))


def _attend_singles(cache: PagedCache, layer: int, group: SingleRows, q: Tensor, scratch: Tensor) -> Tensor:
    """q [G, A, D]: the heads stand where a sequence's rows would, for they share its keys."""
    k, v = _gather(cache, layer, group.blocks, scratch, q.dtype).view(len(q), 1, -1, 2 * cache.head_dim).chunk(2, dim=-1)
    mask = group.mask.to(q.dtype).expand(-1, -1, q.shape[1], -1)
    return F.scaled_dot_product_attention(q.unsqueeze(1), k, v, attn_mask=mask).squeeze(1)


def _attend_many(cache: PagedCache, layer: int, chunk: ManyRows, q: Tensor, scratch: Tensor) -> Tensor:
    tokens = _gather(cache, layer, chunk.blocks, scratch, q.dtype).view(-1, 2 * cache.head_dim)[: chunk.context]
    k, v = (half.expand(1, q.shape[1], -1, -1) for half in tokens.chunk(2, dim=-1))
    mask = None if chunk.mask is None else chunk.mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask, is_causal=mask is None)
    return out.squeeze(0).transpose(0, 1)


def _gather(cache: PagedCache, layer: int, blocks: Tensor, scratch: Tensor, dtype: torch.dtype) -> Tensor:
    return cache.gather(layer, blocks, scratch[: blocks.numel()]).to(dtype)


def _similar(singles: list[tuple[int, Chunk]], cache: PagedCache) -> Iterator[list[tuple[int, Chunk]]]:
    """Split into groups of similar context, longest first, each within GROUP_BYTES and GROUP_PADDING."""
    most = GROUP_BYTES // cache.blocks[0, 0].nbytes
    group: list[tuple[int, Chunk]] = []
    width = used = 0
    for row, chunk in sorted(singles, key=lambda single: single[1].start, reverse=True):
        blocks = chunk.start // cache.block_size + 1
        padded = width * (len(group) + 1)
        if group and (padded > most or padded - used - blocks > GROUP_PADDING * padded):
            yield group
            group, used = [], 0
        if not group:
            width = blocks
        group.append((row, chunk))
        used += blocks
    if group:
        yield group


def _plan_singles(group: list[tuple[int, Chunk]], cache: PagedCache) -> SingleRows:
    width = group[0][1].start // cache.block_size + 1
    tables = []
    for _, chunk in group:
        table = chunk.sequence.block_table[: chunk.start // cache.block_size + 1]
        tables.append(table + table[-1:] * (width - len(table)))
    last = torch.tensor([chunk.start for _, chunk in group])
    visible = torch.arange(width * cache.block_size) <= last[:, None]  # [G, T]
    return SingleRows(
        rows=torch.tensor([row for row, _ in group]),
        blocks=torch.tensor(tables).flatten(),
        mask=_additive(visible, cache.dtype)[:, None, None],
    )


def _plan_many(first_row: int, chunk: Chunk, cache: PagedCache) -> ManyRows:
    context = chunk.start + chunk.count
    mask = None
    if chunk.start:
        visible = torch.arange(context) <= torch.arange(chunk.start, context)[:, None]  # [N, T]
        mask = _additive(visible, cache.dtype)
    table = chunk.sequence.block_table[: -(-context // cache.block_size)]
    return ManyRows(slice(first_row, first_row + chunk.count), context, torch.tensor(table), mask)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
