"""The pipeline's schedule as pure functions: what to run next, and what a step costs when the stages overlap."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Stage = Literal["attention", "a2f", "ffn", "f2a"]


class Ready(NamedTuple):
    """A micro-batch slot whose next stage can run now."""

    slot: int
    since: int
    """Order of arrival: smaller has waited longer."""


def next_slot(ready: Sequence[Ready]) -> int | None:
    """The slot to run next: the one that has waited longest, so that slots keep their distance around the ring."""
    return min(ready, key=lambda r: (r.since, r.slot)).slot if ready else None


class Interval(NamedTuple):
    """One stage of one micro-batch at one layer, in the time unit of its inputs."""

    stage: Stage
    slot: int
    layer: int
    start: float
    end: float


class StageTimes(NamedTuple):
    """How long one micro-batch spends in each stage of a layer."""

    attention: float
    a2f: float
    ffn: float
    f2a: float


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


def fewest_micro_batches(times: StageTimes, most: int = 4) -> int:
    """The smallest count that keeps both halves busy: M >= 2 + t_c / max(t_a, t_f), t_c the mean one-way transfer; within 1..most."""
    slower = max(times.attention, times.ffn)
    if slower <= 0:
        return 1
    return max(1, min(most, math.ceil(2 + (times.a2f + times.f2a) / 2 / slower - 1e-9)))
