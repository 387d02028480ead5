"""Sequences dealt to slots: equal in predicted time whatever their contexts, nobody left waiting, prompts that do not stall decoding."""

import random

import pytest

from afd_ray.engine.kv_cache import BlockAllocator
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.sequence import MicroBatch
from afd_ray.engine.shares import MOST_STRETCH
from afd_ray.engine.stage_costs import CostLine
from afd_ray.request import Request, SamplingParams

COSTS = CostLine(base_us=300.0, per_row_us=10.0, per_token_us=0.1)
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


def scheduler_of(slots: int, contexts: list[int], budget: int = 512) -> Scheduler:
    """All prompts computed, every sequence decoding."""
    scheduler = Scheduler(
        allocator=BlockAllocator(100_000, 16),
        slots=slots,
        max_tokens_per_micro_batch=1_000_000,
        max_running_requests=512,
        max_context=10_000,
        eos_token_ids=(),
    )
    for i, context in enumerate(contexts):
        scheduler.add(Request(f"r{i}", (1,) * context, ENDLESS))
    batch = scheduler.schedule(0)
    if batch:
        land(scheduler, batch)
    scheduler.costs, scheduler.token_budget = COSTS, budget
    return scheduler


def land(scheduler: Scheduler, batch: MicroBatch) -> None:
    scheduler.complete(batch, [Sampled(7) for chunk in batch.chunks if chunk.samples])


def decode_us(batch: MicroBatch | None) -> float:
    return sum(COSTS.per_row_us + COSTS.per_token_us * c.start for c in batch.chunks if c.count == 1) if batch else 0.0


def rounds(scheduler: Scheduler, count: int) -> list[list[MicroBatch | None]]:
    """Each slot in turn lands and begins anew, so many times; what was scheduled, a list a round."""
    flying: dict[int, MicroBatch] = {}
    out: list[list[MicroBatch | None]] = []
    for _ in range(count):
        out.append([])
        for slot in range(scheduler.slots):
            if slot in flying:
                land(scheduler, flying.pop(slot))
            batch = scheduler.schedule(slot)
            out[-1].append(batch)
            if batch:
                flying[slot] = batch
    return out


CONTEXTS = {
    "equal": [500] * 30,
    "two kinds, sorted": [100] * 20 + [2000] * 20,
    "random": random.Random(0).choices(range(20, 4000), k=60),
    "few and long": [9000, 8000, 7000, 50, 40, 30, 8500, 7500, 20, 9000, 7000, 8000],
}


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_slots_are_equal_in_time_though_contexts_differ(contexts: list[int], slots: int) -> None:
    scheduler = scheduler_of(slots, contexts)
    played = rounds(scheduler, 12)
    costliest = COSTS.per_row_us + COSTS.per_token_us * (max(contexts) + len(played))
    for settled in played[4:]:
        us = [decode_us(batch) for batch in settled]
        assert max(us) - min(us) <= 1.5 * costliest  # a row passed over goes in any case, where it may not fit
        assert sum(batch.rows if batch else 0 for batch in settled) >= len(contexts) - 1


def test_long_and_short_contexts_that_pair_up_are_balanced_to_a_tenth() -> None:
    for settled in rounds(scheduler_of(3, CONTEXTS["two kinds, sorted"]), 12)[4:]:
        us = [decode_us(batch) for batch in settled]
        assert max(us) < 1.1 * min(us)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [4, 512])
def test_no_sequence_waits_longer_than_its_queue(seed: int, budget: int) -> None:
    """A round is a turn of every slot: whatever a slot leaves is taken by the next one, or as soon as the token budget lets it."""
    rng = random.Random(seed)
    slots, count = rng.randint(1, 4), rng.randint(2, 24)
    scheduler = scheduler_of(slots, rng.choices(range(20, 5000), k=count), budget)
    turns = 2 * slots + -(-count // budget)
    since = dict.fromkeys((sequence.id for sequence in scheduler.sequences), 0)
    batches = [batch for settled in rounds(scheduler, 30) for batch in settled]
    for turn, batch in enumerate(batches):
        for chunk in batch.chunks if batch else ():
            assert turn - since[chunk.sequence.id] <= turns
            since[chunk.sequence.id] = turn
    assert all(len(batches) - turn <= turns for turn in since.values())


def test_a_prompt_stretches_the_micro_batch_of_decoding_rows_no_further_than_allowed() -> None:
    scheduler = scheduler_of(2, [100] * 20)
    scheduler.add(Request("long", (1,) * 3000, ENDLESS))
    alone = COSTS.base_us + 10 * (COSTS.per_row_us + COSTS.per_token_us * 100)
    batch = scheduler.schedule(0)
    assert batch is not None
    prefill = [chunk.count for chunk in batch.chunks if chunk.sequence.id == "long"]
    assert sum(prefill) > scheduler.token_budget // 8
    assert COSTS.base_us + decode_us(batch) + COSTS.per_row_us * sum(prefill) == pytest.approx(MOST_STRETCH * alone, rel=0.02)


def test_prefill_takes_all_when_nothing_decodes() -> None:
    scheduler = scheduler_of(2, [])
    scheduler.add(Request("long", (1,) * 3000, ENDLESS))
    batch = scheduler.schedule(0)
    assert batch is not None
    assert batch.rows == scheduler.token_budget


def test_a_slot_out_of_use_takes_nothing_and_its_rows_go_to_the_others() -> None:
    scheduler = scheduler_of(4, [100] * 12)
    flying = [batch for batch in (scheduler.schedule(slot) for slot in range(4)) if batch]
    assert [batch.rows for batch in flying] == [3, 3, 3, 3]
    scheduler.use(2)
    for batch in flying:
        land(scheduler, batch)
    assert [(batch.rows if batch else 0) for batch in (scheduler.schedule(slot) for slot in range(4))] == [6, 6, 0, 0]
    with pytest.raises(ValueError, match="slots in use must be from 1 to 4, got 5"):
        scheduler.use(5)
