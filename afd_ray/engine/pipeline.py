"""The pipeline's schedule as pure functions: what to run next, and what a step costs when the stages overlap."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from afd_ray.engine.stage_costs import StageCosts, StageTimes

TOLERANCE = 0.03
"""A count that costs so little more is as good: fewer micro-batches read the weights less often."""
SWITCH_GAIN = 0.05
"""What another count must gain: estimates are noisy, and a change moves rows between slots."""

Stage = Literal["attention", "a2f", "ffn", "f2a"]


class Ready(NamedTuple):
    """A micro-batch slot whose next stage can run now."""

    slot: int
    layer: int
    """That is due; after the last one the head."""
    since: int
    """Order of arrival: smaller has waited longer."""


def next_slot(ready: Sequence[Ready]) -> int | None:
    """The slot to run next: the one nearest to its token, then the one that has waited longest.

    So slots spread over the layers: while one is at the head or in a dense layer, which are attention's, others are in layers that
    are the FFN's. In turn, all would be at the head at once, and the FFN idle. None starves: who has its token is last from then on.
    """
    return min(ready, key=lambda r: (-r.layer, r.since, r.slot)).slot if ready else None


class Interval(NamedTuple):
    """One stage of one micro-batch at one layer, in the time unit of its inputs."""

    stage: Stage
    slot: int
    layer: int
    start: float
    end: float


def timeline(layers: int, slots: int, times: StageTimes) -> list[Interval]:
    """Every stage of one step of `slots` micro-batches over `layers`: attention and FFN serve one at a time, the wires are full duplex."""
    free = {"attention": 0.0, "ffn": 0.0}
    at_attention = [0.0] * slots
    out: list[Interval] = []
    for layer in range(layers):
        for slot in range(slots):
            start = max(at_attention[slot], free["attention"])
            sent = free["attention"] = start + times.attention
            arrived = sent + times.a2f
            begin = max(arrived, free["ffn"])
            done = free["ffn"] = begin + times.ffn
            at_attention[slot] = done + times.f2a
            out += [
                Interval("attention", slot, layer, start, sent),
                Interval("a2f", slot, layer, sent, arrived),
                Interval("ffn", slot, layer, begin, done),
                Interval("f2a", slot, layer, done, at_attention[slot]),
            ]
    return out


def predicted_period(times: StageTimes, slots: int) -> float:
    """How long `slots` micro-batches take for one layer each: either half has them all to serve, and none comes back sooner than its own round."""
    return max(slots * times.attention, slots * times.ffn, sum(times))


def enough_slots(times: StageTimes) -> int:
    """From how many micro-batches on the slower half never waits, however long the other takes: 2 + transfer / slower half."""
    return math.ceil(2 + (times.a2f + times.f2a) / max(times.attention, times.ffn))


class Load(NamedTuple):
    """What an attention rank has to run."""

    sequences: int
    decoding: int
    """Sequences that go on by one row a step."""
    context: int
    """Cached tokens of those, in all."""
    prefill: int
    """Tokens of prompts not yet computed."""


def micro_batches_for(load: Load, costs: StageCosts, most_rows: int, most: int, in_use: int) -> int:
    """How many micro-batches, 1 to `most`, share `load` so that a row costs least: the fewest within TOLERANCE of the best.

    `most_rows` bounds the rows of one micro-batch. The count `in_use` stays unless the other one gains more than SWITCH_GAIN.
    """
    allowed = range(1, max(1, min(most, load.sequences)) + 1)
    us_per_row = {count: _us_per_row(load, costs, most_rows, count) for count in allowed}
    best = min(us_per_row.values())
    wanted = next(count for count, us in us_per_row.items() if us <= best * (1 + TOLERANCE))
    if in_use in us_per_row and us_per_row[in_use] <= us_per_row[wanted] * (1 + SWITCH_GAIN):
        return in_use
    return wanted


def _us_per_row(load: Load, costs: StageCosts, most_rows: int, count: int) -> float:
    """Decoding rows are split; prompts fill every micro-batch up as long as there is enough of them."""
    decoding = load.decoding / count
    chunk = max(0.0, min(load.prefill, most_rows - decoding))
    rows = load.decoding + min(load.prefill, count * chunk)
    return predicted_period(costs.times(decoding + chunk, load.context / count), count) / max(rows, 1)
