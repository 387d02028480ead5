"""Sums since the start, differences between two looks, and the last minute."""

import json
import random
from dataclasses import replace
from functools import reduce
from itertools import pairwise

import pytest

from afd_ray.engine.stage_costs import FlightTimes
from afd_ray.lookback import PERIOD_S, WINDOW_S, Lookback
from afd_ray.measured import Flights, Measured, MeasuredFFN
from tests.measured_scenes import histogram

EARLIER = Measured(
    since_s=100.0,
    at_s=110.0,
    arrivals=3,
    output_tokens=40,
    running=2,
    tpot_ms=histogram(4.0, 5.0),
    flights=Flights(2, 20, 400, 210.5, 90.25, 3, 30.0),
    stages={"attention": histogram(100.0)},
)
LATER = replace(
    EARLIER,
    at_s=125.0,
    arrivals=4,
    output_tokens=55,
    running=1,
    oldest_waiting_s=0.5,
    tpot_ms=histogram(4.0, 5.0, 9.0),
    flights=Flights(3, 31, 500, 310.5, 140.25, 4, 42.0),
    stages={"attention": histogram(100.0, 300.0), "f2a": histogram(7.0)},
)


def test_what_crosses_between_actors_is_json_and_nothing_is_lost() -> None:
    for measured in (EARLIER, LATER):
        dumped = json.loads(json.dumps(measured.dump()))
        assert Measured.load(dumped).dump() == measured.dump()
    ffn = MeasuredFFN(0.0, 2.0, rows=12, steps=3, stages={"ffn": histogram(30.0, 31.0)})
    assert MeasuredFFN.load(json.loads(json.dumps(ffn.dump()))).dump() == ffn.dump()


def test_a_difference_has_what_happened_between_and_what_is_now() -> None:
    between = LATER.since(EARLIER)
    assert (between.span_s, between.arrivals, between.output_tokens) == (15.0, 1, 15)
    assert (between.running, between.oldest_waiting_s) == (1, 0.5)
    assert between.tpot_ms.mean == 9.0
    assert between.flights == Flights(1, 11, 100, 100.0, 50.0, 1, 12.0)
    assert {stage: us.mean for stage, us in between.stages.items()} == {"attention": 300.0, "f2a": 7.0}
    assert LATER.since(LATER).stages == {}


def test_how_much_layers_differ_from_micro_batch_to_micro_batch_is_told_from_sums() -> None:
    """The second layer lasts four times as long as the first, and both by turns 1.5 and 0.5 times their mean."""
    seen = [FlightTimes() for _ in range(9)]
    for number, times in enumerate(seen):
        for mean in (10.0, 40.0):
            times.attended(mean * (1.5 if number % 2 else 0.5))
            times.fed(mean)
    every = reduce(Flights.plus, [Flights(1, 0, 0, 0, 0, 0, 0, (), (), *now.changes(before)) for before, now in pairwise(seen)])
    assert (every.attention_spread, every.ffn_spread) == (0.5, 0.0)
    assert every.minus(every).attention_spread == 0.0
    assert every.plus(every).minus(every) == every


def test_a_histogram_less_an_earlier_one_has_the_quantiles_of_what_came_between() -> None:
    drawn = random.Random(3)
    before, between = ([drawn.lognormvariate(1, 1) for _ in range(500)] for _ in range(2))
    both = histogram(*before, *between)
    left = both.minus(histogram(*before))
    assert left.quantiles(0.5, 0.95, 0.99) == histogram(*between).quantiles(0.5, 0.95, 0.99)
    assert (left.count, left.mean) == (500, pytest.approx(sum(between) / 500))


def test_what_is_older_than_a_minute_is_left_out() -> None:
    now_s, sent = 0.0, 0

    def look() -> Measured:
        return Measured(0.0, now_s, output_tokens=sent)

    lookback = Lookback(look)
    for turn in range(1, 40):
        now_s, sent = turn * PERIOD_S, turn * 10
        lookback.turn()
    recent = lookback.recent()
    assert recent.span_s == WINDOW_S
    assert recent.output_tokens == 10 * WINDOW_S / PERIOD_S


def test_since_its_start_is_all_there_is_of_a_young_actor() -> None:
    now_s = 0.0
    lookback = Lookback(lambda: Measured(0.0, now_s, steps=round(now_s)))
    now_s = 3.0
    assert lookback.recent().steps == 3
