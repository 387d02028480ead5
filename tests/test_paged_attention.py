"""Attention over the paged cache equals the reference over whole keys and values."""

import random

import pytest
import torch
from torch import Tensor

from afd_ray.engine import paged_attention
from afd_ray.engine.kv_cache import BlockAllocator, PagedCache, slot_indices
from afd_ray.engine.paged_attention import Gathered, attend_paged, plan_attention
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.models.step3 import attend
from afd_ray.request import Request

HEADS, DIM, BLOCK, LAYER = 4, 16, 8, 1
MIXED = [(0, 5), (0, 1), (7, 1), (8, 1), (100, 1), (20, 9), (0, 16), (99, 1), (3, 2), (30, 1), (15, 1), (101, 1)]


def paged(shapes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[PagedCache, list[Chunk], Tensor, Tensor]:
    """A filled cache with shuffled blocks, chunks of (start, count), their queries, and what attention must give."""
    rng, noise = random.Random(0), torch.Generator().manual_seed(0)
    allocator = BlockAllocator(200, BLOCK)
    cache = PagedCache(layers=2, num_blocks=200, block_size=BLOCK, head_dim=DIM, dtype=dtype)
    cache.blocks.fill_(1000.0)  # what lies beyond a context must not be seen
    chunks: list[Chunk] = []
    queries, expected = [], []
    for start, count in shapes:
        sequence = Sequence(Request(f"r{len(chunks)}", tuple(range(start + count))))
        sequence.block_table = allocator.allocate(allocator.blocks_for(start + count)) or []
        rng.shuffle(sequence.block_table)
        k, v = torch.randn(2, start + count, DIM, generator=noise).to(dtype).unbind(0)
        q = torch.randn(count, HEADS, DIM, generator=noise).to(dtype)
        cache.write(LAYER, torch.tensor(slot_indices(sequence.block_table, 0, start + count, BLOCK)), k, v)
        chunks.append(Chunk(sequence, start, count, samples=count != 9))
        queries.append(q)
        expected.append(attend(q, k, v, start))
    return cache, chunks, torch.cat(queries), torch.cat(expected)


@pytest.mark.parametrize("shapes", [MIXED, [(40, 1)], [(0, 12)], [(12, 30)]])
def test_equals_the_reference(shapes: list[tuple[int, int]]) -> None:
    cache, chunks, q, expected = paged(shapes, torch.float32)
    torch.testing.assert_close(attend_paged(cache, LAYER, plan_attention(chunks, cache), q), expected, atol=1e-5, rtol=1e-5)


def test_works_in_bfloat16() -> None:
    cache, chunks, q, expected = paged(MIXED, torch.bfloat16)
    out = attend_paged(cache, LAYER, plan_attention(chunks, cache), q)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


def test_a_cache_of_another_dtype_is_cast_to_the_queries() -> None:
    cache, chunks, q, expected = paged(MIXED, torch.bfloat16)
    out = attend_paged(cache, LAYER, plan_attention(chunks, cache), q.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected.float(), atol=2e-2, rtol=2e-2)


def test_groups_of_single_rows_bound_their_padding_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "GROUP_BYTES", 27 * BLOCK * 2 * DIM * 4)  # 27 blocks
    cache, chunks, q, expected = paged(MIXED, torch.float32)
    plan = plan_attention(chunks, cache)
    assert isinstance(plan.keys, Gathered)
    groups = [plan.positions[group.rows].tolist() for group in plan.keys.singles]
    assert groups == [[101, 100], [99], [30, 15], [8, 7], [0]]
    torch.testing.assert_close(attend_paged(cache, LAYER, plan, q), expected, atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_batch_mates() -> None:
    cache, chunks, q, _ = paged(MIXED, torch.float32)
    together = attend_paged(cache, LAYER, plan_attention(chunks, cache), q)
    row = sum(chunk.count for chunk in chunks[:4])
    alone = attend_paged(cache, LAYER, plan_attention(chunks[4:5], cache), q[row : row + 1])
    torch.testing.assert_close(together[row : row + 1], alone, atol=1e-6, rtol=1e-6)


def test_the_plan_says_what_each_row_is() -> None:
    cache, chunks, _, _ = paged([(2, 3), (20, 9), (9, 1)], torch.float32)
    plan = plan_attention(chunks, cache)
    positions = [2, 3, 4, *range(20, 29), 9]
    assert plan.positions.tolist() == positions
    assert plan.token_ids.tolist() == positions  # each sequence's tokens are 0, 1, 2, ...
    assert plan.sample_rows.tolist() == [2, 12]
    tables = [chunks[0].sequence.block_table] * 3 + [chunks[1].sequence.block_table] * 9 + [chunks[2].sequence.block_table]
    assert plan.slots.tolist() == [t[p // BLOCK] * BLOCK + p % BLOCK for t, p in zip(tables, positions, strict=True)]
