"""The paged cache: who owns which block, and where tokens lie."""

import pytest
import torch

from afd_ray.engine.kv_cache import BlockAllocator, PagedCache, check_integrity, slot_indices
from afd_ray.engine.sequence import Sequence
from afd_ray.request import Request


def holding(name: str, blocks: list[int], computed: int = 0) -> Sequence:
    sequence = Sequence(Request(name, tuple(range(max(1, computed)))))
    sequence.block_table, sequence.computed = blocks, computed
    return sequence


def test_allocates_all_or_nothing() -> None:
    allocator = BlockAllocator(4, 16)
    first = allocator.allocate(3)
    assert first == [0, 1, 2]
    assert allocator.allocate(2) is None
    assert (allocator.used, allocator.available) == (3, 1)
    allocator.free(first[1:])
    rest = allocator.allocate(3)
    assert rest is not None
    assert rest == [1, 2, 3], "freed blocks come back in order"


@pytest.mark.parametrize("blocks", [[0, 0], [2], [-1], [3]])
def test_freeing_what_is_not_taken_is_refused(blocks: list[int]) -> None:
    allocator = BlockAllocator(3, 16)
    allocator.allocate(2)
    with pytest.raises(ValueError, match="is not taken"):
        allocator.free(blocks)


@pytest.mark.parametrize(("arguments", "name"), [((0, 16), "num_blocks"), ((4, 0), "block_size")])
def test_sizes_must_be_positive(arguments: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        BlockAllocator(*arguments)


def test_blocks_for_rounds_up() -> None:
    assert [BlockAllocator(4, 16).blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_slots_follow_the_block_table() -> None:
    assert slot_indices([7, 2, 5], 3, 6, 4) == [31, 8, 9, 10, 11, 20]
    assert slot_indices([7, 2, 5], 8, 1, 4) == [20]


def test_gather_returns_what_was_written_and_rewriting_changes_nothing() -> None:
    cache = PagedCache(layers=2, num_blocks=6, block_size=4, head_dim=3, dtype=torch.float32)
    k, v = torch.randn(2, 7, 3).unbind(0)
    slots = torch.tensor(slot_indices([4, 1], 0, 7, 4))
    for _ in range(2):
        cache.write(1, slots, k, v)
        tokens = cache.gather(1, torch.tensor([4, 1]), torch.empty(2, 4, 6)).view(8, 6)
        assert torch.equal(tokens[:7], torch.cat((k, v), dim=1))
        assert not cache.blocks[0].any()
        assert int((cache.blocks != 0).any(-1).sum()) == 7


def test_integrity_of_a_sound_cache_has_no_findings() -> None:
    allocator = BlockAllocator(4, 4)
    allocator.allocate(3)
    assert check_integrity(allocator, [holding("a", [0, 2], computed=8), holding("b", [1]), holding("c", [])]) == []


def test_integrity_names_each_fault() -> None:
    allocator = BlockAllocator(5, 4)
    allocator.allocate(3)
    findings = check_integrity(allocator, [holding("a", [0], computed=5), holding("b", [0, 4])])
    assert findings == [
        "a has 5 computed tokens in 1 blocks",
        "block 0 is owned by a and b",
        "block 4 of b is not allocated",
        "block 1 is leaked: taken, and owned by no sequence",
        "block 2 is leaked: taken, and owned by no sequence",
    ]
