"""Blocks of requests that went elsewhere: kept until fetched, not wanted or given up, and never leaked."""

from itertools import count

import torch

from afd_ray.engine.kv_cache import BlockAllocator, check_integrity
from afd_ray.engine.left_behind import LeftBehind
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.scheduler import Scheduler
from afd_ray.handoff.kv_wire import KVOrder
from afd_ray.request import Request
from tests.engine_cache import cache_of


class Rank:
    """A scheduler with requests of which 8 tokens are computed, and what it leaves behind."""

    def __init__(self, *names: str) -> None:
        self.cache = cache_of()
        self.scheduler = Scheduler(
            allocator=BlockAllocator(self.cache.num_blocks, self.cache.block_size),
            slots=1,
            max_tokens_per_micro_batch=64,
            max_running_requests=8,
            max_context=64,
            eos_token_ids=(),
        )
        numbers = count()
        self.left = LeftBehind(self.scheduler, self.cache, lambda: b"%016d" % next(numbers))
        for name in names:
            self.scheduler.add(Request(name, (1,) * 8))
        self.step()

    def step(self) -> None:
        batch = self.scheduler.schedule(0)
        if batch is not None:
            self.scheduler.complete(batch, [Sampled(7) for chunk in batch.chunks if chunk.samples])

    @property
    def findings(self) -> list[str]:
        return check_integrity(self.scheduler.allocator, [*self.scheduler.sequences, *self.left.sequences])


def key(number: int) -> bytes:
    return b"%016d" % number


def test_what_is_kept_is_no_longer_scheduled_and_holds_its_blocks() -> None:
    rank = Rank("a", "b")
    assert rank.left.empty.is_set()
    kept = rank.left.keep("a")
    assert kept == (key(0), 8, 8 * rank.cache.token_bytes)
    assert not rank.left.empty.is_set()
    assert [sequence.id for sequence in rank.scheduler.sequences] == ["b"]
    assert rank.findings == []
    rank.left.let_go(key(0))
    assert rank.left.empty.is_set()
    assert rank.scheduler.abort("b")
    assert rank.scheduler.kv_used == 0


def test_what_is_in_flight_or_not_begun_is_not_kept() -> None:
    rank = Rank("a")
    rank.scheduler.add(Request("b", (1,) * 8))
    assert rank.left.keep("b") is None
    assert rank.scheduler.schedule(0) is not None
    assert rank.left.keep("a") is None
    assert rank.left.keep("nobody") is None
    assert rank.left.empty.is_set()


def test_it_is_lent_once_as_far_as_it_is_there() -> None:
    rank = Rank("a")
    rank.left.keep("a")
    assert rank.left.lend(KVOrder(key(0), 9)) is None
    assert rank.left.lend(KVOrder(key(1), 8)) is None
    lot = rank.left.lend(KVOrder(key(0), 6))
    assert lot is not None
    assert lot.answer == (6, 6 * rank.cache.token_bytes)
    assert sum(len(view) for layer in lot.layers for view in layer) == lot.answer.size_bytes
    assert rank.left.lend(KVOrder(key(0), 6)) is None
    assert rank.left.lend(KVOrder(key(0), 0)) is None, "who does not want it cannot take it from who reads it"
    assert rank.left.asked == 5


def test_what_is_lent_outlasts_the_giving_up() -> None:
    rank = Rank("a", "b")
    rank.left.keep("a")
    rank.left.keep("b")
    rank.left.lend(KVOrder(key(1), 8))
    rank.left.give_up()
    assert [sequence.id for sequence in rank.left.sequences] == ["b"]
    assert (rank.findings, rank.left.lending) == ([], True)
    rank.left.let_go(key(1))
    rank.left.let_go(key(1))
    assert (rank.scheduler.kv_used, rank.left.lending, rank.left.empty.is_set()) == (0, False, True)


def test_blocks_that_are_kept_are_not_given_to_others() -> None:
    rank = Rank("a")
    rank.left.keep("a")
    before = rank.cache.blocks.clone()
    rank.scheduler.add(Request("b", (1,) * 40))
    rank.step()
    held = {block for sequence in rank.left.sequences for block in sequence.block_table}
    assert held.isdisjoint(rank.scheduler.sequences[0].block_table)
    assert torch.equal(rank.cache.blocks, before)
