"""The pipeline's schedule: golden timelines, and the micro-batch count that keeps both halves busy."""

import pytest

from afd_ray.engine.pipeline import Interval, Ready, StageTimes, fewest_micro_batches, next_slot, timeline


def drawn(intervals: list[Interval], stage: str) -> str:
    """One character a time unit: the slot in service, or a dot."""
    end = int(max(i.end for i in intervals))
    row = ["."] * end
    for i in intervals:
        if i.stage == stage:
            row[int(i.start) : int(i.end)] = str(i.slot) * int(i.end - i.start)
    return "".join(row)


def test_three_micro_batches_hide_the_wire() -> None:
    """Section 3.2 of the paper: A = F = one stage, both wires together one more."""
    intervals = timeline(layers=3, slots=3, times=StageTimes(attention=2, a2f=1, ffn=2, f2a=1))
    assert drawn(intervals, "attention") == "001122001122001122...."
    assert drawn(intervals, "ffn") ==       "...001122001122001122."  # fmt: skip


def test_two_micro_batches_leave_bubbles_when_the_wire_is_long() -> None:
    intervals = timeline(layers=2, slots=2, times=StageTimes(attention=2, a2f=1, ffn=2, f2a=1))
    assert drawn(intervals, "attention") == "0011..0011...."
    assert drawn(intervals, "ffn") ==       "...0011..0011."  # fmt: skip


def test_the_longest_waiting_slot_goes_first() -> None:
    assert next_slot([Ready(0, since=7), Ready(2, since=3), Ready(1, since=5)]) == 2
    assert next_slot([]) is None


@pytest.mark.parametrize(
    ("times", "count"),
    [
        (StageTimes(272, 91, 272, 181), 3),
        (StageTimes(272, 0, 272, 0), 2),
        (StageTimes(100, 300, 100, 300), 4),
        (StageTimes(0, 1, 0, 1), 1),
    ],
)
def test_fewest_micro_batches(times: StageTimes, count: int) -> None:
    assert fewest_micro_batches(times) == count
