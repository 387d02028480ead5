"""The estimator of stage costs: it finds the line behind noisy samples, and what it cannot see it does not forget."""

import random

import pytest

from afd_ray.engine.stage_costs import CostLine, CostMeter, FlightTimes, StageMeter, mean_transfer_us, transfer_us


def measure(meter: CostMeter, truth: CostLine, rows: list[int], context: int = 0, noise: float = 0.0, seed: int = 0) -> None:
    rng = random.Random(seed)
    for count in rows:
        tokens = context * count
        meter.add(count, tokens, truth.duration_us(count, tokens) * (1 + rng.uniform(-noise, noise)))


def test_different_row_counts_tell_the_base_from_the_slope() -> None:
    meter, truth = CostMeter(), CostLine(800.0, 20.0)
    measure(meter, truth, [8, 12, 24, 32, 48, 96] * 20, noise=0.1)
    for rows in (8, 16, 32, 64):
        assert meter.line.duration_us(rows) == pytest.approx(truth.duration_us(rows), rel=0.06)


def test_rows_and_context_are_told_apart() -> None:
    meter, truth = CostMeter(), CostLine(200.0, 10.0, 0.05)
    for rows, context in ((96, 100), (48, 1000), (24, 400), (12, 2000), (6, 50)) * 16:
        measure(meter, truth, [rows], context)
    assert meter.line.duration_us(32, 32 * 600) == pytest.approx(truth.duration_us(32, 32 * 600), rel=0.05)


def test_the_slope_is_kept_while_one_row_count_alone_is_seen() -> None:
    meter, truth = CostMeter(), CostLine(1000.0, 10.0)
    measure(meter, truth, [8, 64] * 8)
    measure(meter, truth, [32] * 2000)
    assert meter.line.duration_us(16) == pytest.approx(truth.duration_us(16), rel=0.05)


def test_a_stage_that_has_become_slower_is_followed() -> None:
    meter = CostMeter()
    measure(meter, CostLine(100.0, 1.0), [32] * 100)
    measure(meter, CostLine(300.0, 3.0), [32] * 32)
    assert meter.line.duration_us(32) == pytest.approx(396.0, rel=0.02)


@pytest.mark.parametrize(("share", "expected"), [(0.5, CostLine(500.0, 5.0)), (0.8, CostLine(800.0, 2.0))])
def test_with_one_row_count_a_share_of_its_time_is_taken_for_the_base(share: float, expected: CostLine) -> None:
    meter = CostMeter(base_share=share)
    measure(meter, CostLine(per_row_us=10.0), [100] * 40)
    assert meter.line == pytest.approx(expected, rel=0.01)


def test_rows_and_context_that_grow_together_share_what_is_not_the_base() -> None:
    meter = CostMeter(base_share=0.8)
    measure(meter, CostLine(per_row_us=10.0), [100] * 40, context=30)
    assert meter.line == pytest.approx(CostLine(800.0, 1.0, 1 / 30), rel=0.01)


def test_no_cost_is_negative() -> None:
    meter = CostMeter()
    for rows, us in ((8, 10.0), (16, 50.0), (32, 300.0)):
        meter.add(rows, 0, us)
    assert min(meter.line) >= 0


def test_without_samples_everything_is_free() -> None:
    assert StageMeter().costs.times(32, 1000) == (0.0, 0.0, 0.0, 0.0)


def test_a_round_trip_tells_of_the_transfer_unless_rows_lay_unseen() -> None:
    assert transfer_us(1000.0, busy_us=700.0, unseen_us=20.0) == 280.0
    assert transfer_us(1000.0, busy_us=700.0, unseen_us=200.0) is None
    assert transfer_us(100.0, busy_us=101.0, unseen_us=0.0) == 0.0


def test_a_mean_counts_all_round_trips_but_those_that_waited_for_most_of_it() -> None:
    assert mean_transfer_us(1000.0, busy_us=500.0, unseen_us=400.0) == 300.0
    assert mean_transfer_us(1000.0, busy_us=300.0, unseen_us=501.0) is None


def test_a_micro_batch_counts_by_its_mean_layer_and_hidden_transfers_not_at_all() -> None:
    meter, times = StageMeter(), FlightTimes()
    for slack in (0.0, 200.0):
        times.attended(100.0)
        times.returned(350.0, 300, slack)
    times.attended(40.0)
    meter.add(times, rows=10, context_tokens=0, layers=2)
    stage = meter.costs.times(10, 0)
    assert stage == pytest.approx((120.0, 25.0, 300.0, 25.0), rel=0.01)
