"""What an autoscaler remembers and records outlives it as JSON, and does not grow."""

import json

import pytest

from afd_ray.autoscaling.memory import Memory
from afd_ray.autoscaling.record import KEPT, Action, Entry, Record
from afd_ray.autoscaling.values import Counts, Outcome, Override


def entry(number: int, action: Action = "hold") -> Entry:
    return Entry(number, 1e9 + number, "balance", action, Counts(1, 1), Counts(2, 1), "why", {"requests": 3, "tpot_p95_ms": None})


def test_an_entry_comes_back_from_json_as_it_was() -> None:
    assert Entry.load(json.loads(json.dumps(entry(5).dump()))) == entry(5)


def test_many_decisions_to_hold_do_not_crowd_out_a_resize() -> None:
    record = Record()
    record.add(entry(1, "resize"))
    dropped = [record.add(entry(number)) for number in range(2, KEPT + 12)]
    assert [gone.number for gone in dropped if gone] == list(range(2, 12))
    assert [kept.number for kept in record.after(0)] == [1, *range(12, KEPT + 12)]


def test_a_record_goes_on_with_the_numbers_of_the_one_before() -> None:
    record = Record([entry(9), entry(7, "resize"), entry(8, "committed")])
    assert record.next_number == 10
    assert [kept.number for kept in record.after(7)] == [8, 9]


@pytest.mark.parametrize(
    "memory",
    [
        Memory(),
        Memory({"a": [1]}, Override(Counts(1, 2), 30.0), Outcome(Counts(2, 2), False, 20.0), Counts(3, 3), 7.0),
    ],
)
def test_a_memory_comes_back_from_json_as_it_was(memory: Memory) -> None:
    assert Memory.load(json.loads(json.dumps(memory.dump()))) == memory


def test_an_override_is_over_in_time() -> None:
    memory = Memory(override=Override(Counts(1, 1), 30.0))
    assert memory.override_at(29.0) is not None
    assert memory.override_at(30.0) is None


@pytest.mark.parametrize(("served", "committed"), [(Counts(2, 2), True), (Counts(1, 1), False)])
def test_how_a_resize_ended_that_nobody_saw_end_is_told_by_what_serves(served: Counts, committed: bool) -> None:
    memory = Memory(asked=Counts(2, 2))
    memory.settle(served, 50.0)
    assert (memory.last, memory.asked) == (Outcome(Counts(2, 2), committed, 50.0), None)


def test_only_growth_tells_how_long_new_ranks_take() -> None:
    memory = Memory(start_delay_s=5.0)
    memory.note_end(Counts(2, 2), Counts(1, 2), True, 10.0, duration_s=1.0)
    assert memory.start_delay_s == 5.0
    memory.note_end(Counts(1, 2), Counts(1, 3), False, 20.0, duration_s=90.0)
    assert memory.start_delay_s == 5.0
    memory.note_end(Counts(1, 2), Counts(1, 3), True, 30.0, duration_s=8.0)
    assert memory.start_delay_s == 8.0
