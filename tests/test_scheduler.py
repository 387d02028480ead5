"""Continuous batching, step by step; the schedules are golden text."""

import pytest

from afd_ray.engine.kv_cache import BlockAllocator, check_integrity
from afd_ray.engine.sampling import Sampled
from afd_ray.engine.scheduler import Scheduler
from afd_ray.engine.sequence import MicroBatch
from afd_ray.request import KVTicket, Request, SamplingParams, TokenOutput

EOS, TOKEN = 0, 7


def make(
    *, blocks: int = 100, block_size: int = 4, slots: int = 1, budget: int = 8, running: int = 8, context: int = 64
) -> Scheduler:
    return Scheduler(
        allocator=BlockAllocator(blocks, block_size),
        slots=slots,
        max_tokens_per_micro_batch=budget,
        max_running_requests=running,
        max_context=context,
        eos_token_ids=(EOS,),
    )


def request(
    name: str, prompt: int, max_tokens: int | None = 3, *, ignore_eos: bool = False, stop: tuple[int, ...] = ()
) -> Request:
    return Request(name, (1,) * prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop))


def finish(scheduler: Scheduler, batch: MicroBatch, token: int = TOKEN) -> list[TokenOutput]:
    return scheduler.complete(batch, [Sampled(token) for chunk in batch.chunks if chunk.samples])


def play(scheduler: Scheduler, steps: int) -> str:
    """The schedule of so many steps, the slots taking turns."""
    lines, in_flight = [], dict[int, MicroBatch]()
    for step in range(steps):
        slot = step % scheduler.slots
        if slot in in_flight:
            finish(scheduler, in_flight.pop(slot))
        batch = scheduler.schedule(slot)
        lines.append(str(batch) if batch else f"slot {slot}: idle")
        if batch:
            in_flight[slot] = batch
        assert check_integrity(scheduler.allocator, scheduler.sequences) == []
    for batch in in_flight.values():
        finish(scheduler, batch)
    return "\n".join(lines)


def run_one(scheduler: Scheduler, tokens: list[int]) -> list[TokenOutput]:
    outputs = []
    for token in tokens:
        batch = scheduler.schedule(0)
        assert batch is not None
        outputs += finish(scheduler, batch, token)
    return outputs


def test_a_long_prompt_is_chunked_while_others_decode() -> None:
    scheduler = make()
    scheduler.add(request("a", 3, 6))
    scheduler.add(request("b", 20))
    assert play(scheduler, 7) == (
        "slot 0: a prefill 0..2, b prefill 0..4\n"
        "slot 0: a decode@3, b prefill 5..11\n"
        "slot 0: a decode@4, b prefill 12..18\n"
        "slot 0: a decode@5, b decode@19\n"
        "slot 0: a decode@6, b decode@20\n"
        "slot 0: a decode@7, b decode@21\n"
        "slot 0: idle"
    )


def test_decode_rows_are_shared_out_over_the_slots() -> None:
    scheduler = make(slots=3)
    for name in "abcd":
        scheduler.add(request(name, 2, 4))
    assert play(scheduler, 10) == (
        "slot 0: a prefill 0..1, b prefill 0..1, c prefill 0..1, d prefill 0..1\n"
        "slot 1: idle\n"
        "slot 2: idle\n"
        "slot 0: a decode@2, d decode@2\n"
        "slot 1: b decode@2\n"
        "slot 2: c decode@2\n"
        "slot 0: a decode@3, d decode@3\n"
        "slot 1: b decode@3\n"
        "slot 2: c decode@3\n"
        "slot 0: a decode@4, d decode@4"
    )


def test_the_youngest_idle_sequence_is_preempted_and_starts_over_with_its_tokens() -> None:
    scheduler = make(blocks=5, block_size=2, budget=6)
    scheduler.add(request("a", 4, 6))
    scheduler.add(request("b", 2, 5))
    scheduler.add(request("next", 7, 1))
    assert play(scheduler, 10) == (
        "slot 0: a prefill 0..3, b prefill 0..1\n"
        "slot 0: a decode@4, b decode@2\n"
        "slot 0: a decode@5, b decode@3\n"
        "slot 0: a decode@6\n"
        "slot 0: a decode@7\n"
        "slot 0: a decode@8\n"
        "slot 0: b prefill 0..4\n"
        "slot 0: b decode@5\n"
        "slot 0: next prefill 0..5\n"
        "slot 0: next decode@6"
    )
    assert scheduler.preemptions == 1


def test_prefill_and_decode_leave_room_for_each_other() -> None:
    scheduler = make(budget=4)
    for name in "abcd":
        scheduler.add(request(name, 1, 6))
    assert play(scheduler, 1) == "slot 0: a decode@0, b decode@0, c decode@0, d decode@0"
    scheduler.add(request("long", 3))
    assert play(scheduler, 3) == (
        "slot 0: a decode@1, b decode@1, c decode@1, long prefill 0..0\n"
        "slot 0: d decode@1, a decode@2, b decode@2, long prefill 1..1\n"
        "slot 0: c decode@2, d decode@2, a decode@3, b decode@3"
    )


def test_prompts_are_computed_first_come_first_served() -> None:
    scheduler = make(budget=4, slots=2)
    for name in "abc":
        scheduler.add(request(name, 6, 1))
    assert play(scheduler, 4) == (
        "slot 0: a prefill 0..3\nslot 1: b prefill 0..3\nslot 0: a prefill 4..5, c prefill 0..1\nslot 1: b prefill 4..5"
    )


def test_a_budget_of_one_row_alternates() -> None:
    scheduler = make(budget=1)
    scheduler.add(request("a", 1, 9))
    scheduler.add(request("b", 3))
    assert play(scheduler, 5) == (
        "slot 0: a decode@0\nslot 0: b prefill 0..0\nslot 0: a decode@1\nslot 0: b prefill 1..1\nslot 0: a decode@2"
    )


def test_admission_is_first_come_first_served_within_the_limits() -> None:
    scheduler = make(running=2, budget=64)
    for name, prompt in (("a", 4), ("b", 4), ("c", 1)):
        scheduler.add(request(name, prompt))
    scheduler.schedule(0)
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    small = make(blocks=4, budget=64)
    for name, prompt in (("a", 8), ("b", 9), ("c", 1)):
        small.add(request(name, prompt))
    small.schedule(0)
    assert [s.id for s in small.sequences if s.block_table] == ["a"], "c must not overtake b"


def test_admission_keeps_a_block_free_for_each_running_sequence() -> None:
    scheduler = make(blocks=5, budget=64)
    for name, prompt in (("a", 8), ("b", 8), ("c", 4)):
        scheduler.add(request(name, prompt))
    assert str(scheduler.schedule(0)) == "slot 0: a prefill 0..7, b prefill 0..7"
    assert scheduler.kv_used == 4


@pytest.mark.parametrize(
    ("asked", "tokens", "reasons"),
    [
        (request("r", 3, 2), [TOKEN, TOKEN], [None, "length"]),
        (request("r", 3), [EOS], ["stop"]),
        (request("r", 3, ignore_eos=True), [EOS, TOKEN], [None, None]),
        (request("r", 3, stop=(9,)), [TOKEN, 9], [None, "stop"]),
        (request("r", 3, 1), [EOS], ["stop"]),
        (request("r", 61, None), [TOKEN] * 3, [None, None, "length"]),
    ],
    ids=["max_tokens", "eos", "ignore_eos", "stop id", "eos as the last token", "context end"],
)
def test_how_a_sequence_ends(asked: Request, tokens: list[int], reasons: list[str | None]) -> None:
    scheduler = make(budget=64)
    scheduler.add(asked)
    outputs = run_one(scheduler, tokens)
    assert [output.finish_reason for output in outputs] == reasons
    assert [output.token_id for output in outputs] == tokens
    assert scheduler.has_work == (reasons[-1] is None)
    assert (scheduler.kv_used == 0) == (reasons[-1] is not None)


def test_a_cache_that_one_sequence_fills_ends_it() -> None:
    scheduler = make(blocks=3)
    scheduler.add(request("r", 8, None))
    assert [output.finish_reason for output in run_one(scheduler, [TOKEN] * 4)] == [None, None, None, "length"]
    assert scheduler.kv_used == 0


@pytest.mark.parametrize(
    ("asked", "generated", "message"),
    [
        (Request("r", ()), (), "prompt must hold at least 1 token, got 0"),
        (request("r", 12), (), "prompt must leave room for a token in the context of 12 tokens, got 12 tokens"),
        (request("r", 9), (5, 5, 5), "prompt must leave room for a token in the context of 12 tokens, got 12 tokens"),
        (request("r", 2, 2), (5, 5), r"generated must be fewer than max_tokens \(2\), got 2 tokens"),
        (request("taken", 2), (), "request id must be new, got taken, which is in progress"),
    ],
)
def test_add_refuses_what_can_never_run(asked: Request, generated: tuple[int, ...], message: str) -> None:
    scheduler = make(blocks=3)
    scheduler.add(request("taken", 2))
    with pytest.raises(ValueError, match=f"^{message}$"):
        scheduler.add(asked, generated)


def test_abort_of_an_idle_and_of_a_waiting_request_frees_at_once() -> None:
    scheduler = make(running=1)
    scheduler.add(request("a", 2))
    scheduler.add(request("b", 2))
    run_one(scheduler, [TOKEN])
    assert scheduler.abort("b")
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert (scheduler.has_work, scheduler.kv_used) == (False, 0)


def test_abort_in_flight_frees_when_its_micro_batch_completes() -> None:
    scheduler = make()
    scheduler.add(request("a", 2))
    scheduler.add(request("b", 2))
    batch = scheduler.schedule(0)
    assert batch is not None
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert scheduler.kv_used == 2
    assert [output.request_id for output in finish(scheduler, batch)] == ["b"]
    assert scheduler.kv_used == 1


def test_an_error_ends_its_own_row_alone() -> None:
    scheduler = make()
    scheduler.add(request("a", 2))
    scheduler.add(request("b", 2))
    batch = scheduler.schedule(0)
    assert batch is not None
    bad, good = scheduler.complete(batch, [Sampled(None, error="not finite"), Sampled(TOKEN)])
    assert (bad.token_id, bad.finish_reason, bad.error) == (None, "error", "not finite")
    assert (good.token_id, good.finish_reason) == (TOKEN, None)
    assert [sequence.id for sequence in scheduler.sequences] == ["b"]


def test_a_cancelled_micro_batch_is_scheduled_again() -> None:
    scheduler = make(slots=2)
    scheduler.add(request("a", 4))
    scheduler.add(request("b", 2))
    batch = scheduler.schedule(0)
    assert batch is not None
    scheduler.abort("b")
    scheduler.cancel(batch)
    assert str(scheduler.schedule(1)) == "slot 1: a prefill 0..3"
    assert scheduler.kv_used == 1


def test_generated_tokens_are_resumed_ahead_of_requests_not_begun() -> None:
    scheduler = make(budget=64)
    scheduler.add(request("new", 2))
    scheduler.add(request("old", 2), generated=(5, 6))
    scheduler.add(request("older", 3), generated=(5,))
    assert play(scheduler, 2) == (
        "slot 0: old prefill 0..3, older prefill 0..3, new prefill 0..1\nslot 0: older decode@4, new decode@2"
    )


def arriving(positions: int = 9) -> Scheduler:
    """With a request whose first positions are being fetched, admitted and not there yet."""
    scheduler = make()
    scheduler.add(request("a", 8), (TOKEN,) * 2, KVTicket("host:1", b"key", positions, 0))
    assert scheduler.schedule(0) is None
    (sequence,) = scheduler.to_fetch
    assert (sequence.block_table, sequence.remaining, sequence.to_prefill) == ([0, 1, 2], 10, 10 - positions)
    sequence.ticket = None
    assert scheduler.to_fetch == []
    return scheduler


@pytest.mark.parametrize(
    ("positions", "schedule"), [(9, "slot 0: a decode@9"), (4, "slot 0: a prefill 4..9"), (0, "slot 0: a prefill 0..7")]
)
def test_a_request_whose_keys_and_values_have_come_goes_on_after_them(positions: int, schedule: str) -> None:
    scheduler = arriving()
    scheduler.add(request("b", 3))
    assert play(scheduler, 1) == "slot 0: b prefill 0..2", "others are not held up"
    scheduler.abort("b")
    scheduler.arrived("a", positions)
    assert str(scheduler.schedule(0)) == schedule
    assert check_integrity(scheduler.allocator, scheduler.sequences) == []


def test_abort_while_arriving_frees_when_the_fetch_is_over() -> None:
    scheduler = arriving()
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert (scheduler.requests_in_progress(), scheduler.kv_used, scheduler.has_work) == ([], 3, True)
    assert check_integrity(scheduler.allocator, scheduler.sequences) == []
    scheduler.arrived("a", 9)
    assert (scheduler.kv_used, scheduler.has_work) == (0, False)


def test_draining_leaves_blocks_that_are_written_to_until_the_fetch_is_over() -> None:
    scheduler = arriving()
    assert [asked.id for asked, _ in scheduler.drain_all()] == ["a"]
    assert scheduler.kv_used == 3
    scheduler.arrived("a", 9)
    assert (scheduler.kv_used, scheduler.schedule(0)) == (0, None)


def test_what_arrives_counts_against_the_limits_of_admission() -> None:
    scheduler = make(running=1)
    scheduler.add(request("a", 8), (), KVTicket("host:1", b"key", 7, 0))
    scheduler.add(request("b", 3))
    assert scheduler.schedule(0) is None
    with pytest.raises(ValueError, match="request id must be new"):
        scheduler.add(request("a", 3))
    scheduler.arrived("a", 7)
    assert play(scheduler, 1) == "slot 0: a decode@7"


def test_draining_gives_back_every_request_with_its_tokens() -> None:
    scheduler = make(running=1)
    first, second = request("a", 2), request("b", 2)
    scheduler.add(first)
    scheduler.add(second)
    run_one(scheduler, [5, 6])
    assert scheduler.requests_in_progress() == [(first, (5, 6)), (second, ())]
    assert scheduler.drain_all() == [(first, (5, 6)), (second, ())]
    assert (scheduler.has_work, scheduler.kv_used) == (False, 0)


def test_reslot_and_drain_need_every_slot_landed() -> None:
    scheduler = make(slots=2)
    scheduler.add(request("a", 2))
    batch = scheduler.schedule(1)
    assert batch is not None
    for act in (scheduler.drain_all, lambda: scheduler.reslot(3)):
        with pytest.raises(ValueError, match=r"slots in flight: \[1\]"):
            act()
    with pytest.raises(ValueError, match="slot 1 is still in flight"):
        scheduler.schedule(1)
    finish(scheduler, batch)
    scheduler.reslot(1)
    with pytest.raises(ValueError, match="slot must be from 0 to 0, got 1"):
        scheduler.schedule(1)


def test_complete_refuses_a_batch_twice_and_a_wrong_number_of_tokens() -> None:
    scheduler = make()
    scheduler.add(request("a", 2))
    batch = scheduler.schedule(0)
    assert batch is not None
    with pytest.raises(ValueError, match="sampled must hold 1 tokens"):
        scheduler.complete(batch, [])
    finish(scheduler, batch)
    with pytest.raises(ValueError, match="not in flight"):
        finish(scheduler, batch)
