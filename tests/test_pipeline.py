"""The pipeline's schedule: golden timelines, the period they settle to, and the micro-batch count that costs least."""

import pytest

from afd_ray.engine.pipeline import Interval, Load, Ready, enough_slots, micro_batches_for, next_slot, predicted_period, timeline
from afd_ray.engine.stage_costs import CostLine, StageCosts, StageTimes


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


def test_the_slot_nearest_to_its_token_goes_first_then_the_one_that_waited_longest() -> None:
    assert next_slot([Ready(0, 4, since=3), Ready(2, 5, since=9), Ready(1, 5, since=7)]) == 1
    assert next_slot([]) is None


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "times", [StageTimes(2, 1, 2, 1), StageTimes(3, 0, 2, 0), StageTimes(1, 5, 2, 4), StageTimes(1, 1, 6, 1)], ids=str
)
def test_the_predicted_period_is_what_the_timeline_settles_to(times: StageTimes, slots: int) -> None:
    layers = 40
    starts = [i.start for i in timeline(layers, slots, times) if i.stage == "attention" and i.slot == 0]
    assert starts[-1] - starts[layers // 2] == (layers - 1 - layers // 2) * predicted_period(times, slots)


def decoding(sequences: int, context: int = 0) -> Load:
    return Load(sequences, decoding=sequences, context=context * sequences, prefill=0)


def proportional(us_a_row: float, transfer_us: float = 0.0) -> StageCosts:
    return StageCosts(CostLine(per_row_us=us_a_row), CostLine(per_row_us=us_a_row), CostLine(base_us=transfer_us))


@pytest.mark.parametrize(
    ("costs", "load", "count"),
    [
        (proportional(10), decoding(96), 2),
        (proportional(10, transfer_us=300), decoding(96), 3),
        (proportional(10, transfer_us=3000), decoding(96), 4),
        (StageCosts(CostLine(2000, 1), CostLine(2000, 1), CostLine()), decoding(96), 1),
        (StageCosts(CostLine(500, 20), CostLine(1000, 10), CostLine(10)), decoding(96), 2),
        (StageCosts(CostLine(0, 1, 1), CostLine(per_row_us=1001), CostLine()), decoding(96, context=1000), 2),
        (StageCosts(CostLine(0, 1), CostLine(per_row_us=1001), CostLine()), decoding(96, context=1000), 1),
        (proportional(10, transfer_us=3000), decoding(1), 1),
        (proportional(1000, transfer_us=3000), decoding(2), 2),
        (StageCosts(CostLine(), CostLine(), CostLine()), decoding(96), 1),
        (StageCosts(CostLine(2000, 1), CostLine(2000, 1), CostLine()), Load(9, 0, 0, prefill=9000), 2),
    ],
    ids=[
        "equal halves, no transfer",
        "transfer of a third of a stage",
        "transfer-bound",
        "small micro-batches re-read all expert weights",
        "some base and some slope",
        "contexts make the halves equal",
        "one half does nearly all",
        "1 request",
        "2 requests",
        "nothing measured yet",
        "prompts fill every micro-batch",
    ],
)
def test_the_count_in_which_a_row_costs_least(costs: StageCosts, load: Load, count: int) -> None:
    assert micro_batches_for(load, costs, most_rows=512, most=4, in_use=0) == count


def test_the_count_in_use_stays_until_another_gains_enough() -> None:
    costs = proportional(10, transfer_us=40)  # 2 micro-batches cost 4% more than 3
    assert [micro_batches_for(decoding(96), costs, 512, most=4, in_use=count) for count in (1, 2, 3, 4)] == [3, 2, 3, 4]
    much = proportional(10, transfer_us=100)
    assert micro_batches_for(decoding(96), much, 512, most=4, in_use=2) == 3


STEP3_LAYERS = 61


def waits(intervals: list[Interval]) -> float:
    """How long attention stands still between its first and its last work."""
    served = sorted((i.start, i.end) for i in intervals if i.stage == "attention")
    return served[-1][1] - served[0][0] - sum(end - start for start, end in served)


def test_three_equal_stages_of_272_us_take_49_8_ms_and_leave_no_bubble() -> None:
    """Sections 3.1 and 6 of the paper: 61 layers, three micro-batches, the transfer both ways as long as either half."""
    times = StageTimes(attention=272, a2f=91, ffn=272, f2a=181)
    two_steps = timeline(2 * STEP3_LAYERS, 3, times)
    assert waits(two_steps) == 0
    began = [i.start for i in two_steps if i.stage == "attention" and i.slot == 0]
    assert (began[STEP3_LAYERS] - began[0]) / 1e3 == pytest.approx(49.8, abs=0.05)
    assert STEP3_LAYERS * predicted_period(times, 3) == began[STEP3_LAYERS] - began[0]


@pytest.mark.parametrize("transfer", range(0, 1361, 68))
def test_a_longer_transfer_takes_more_micro_batches_to_hide(transfer: int) -> None:
    """Equal halves: the fewest micro-batches of which none waits are 2 + transfer / half, rounded up."""
    times = StageTimes(attention=272, a2f=transfer / 3, ffn=272, f2a=transfer * 2 / 3)
    fewest = next(slots for slots in range(1, 12) if waits(timeline(8, slots, times)) < 1e-6)
    assert fewest == enough_slots(times)


@pytest.mark.parametrize("ffn", [68, 136, 408])
@pytest.mark.parametrize("transfer", [0, 100, 272, 600])
def test_with_enough_micro_batches_the_slower_half_never_waits(ffn: int, transfer: int) -> None:
    times = StageTimes(attention=272, a2f=transfer / 2, ffn=ffn, f2a=transfer / 2)
    slots = enough_slots(times)
    assert predicted_period(times, slots) == slots * max(times.attention, times.ffn)
