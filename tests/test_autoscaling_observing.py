"""What a policy is shown follows from what the actors measured between two looks."""

import pytest

from afd_ray.autoscaling.observing import Look, Observer
from afd_ray.autoscaling.values import Counts, Goals, Observation
from afd_ray.measured import Flights, Measured, MeasuredFFN
from tests.measured_scenes import ffn_rank, histogram, rank

KNOWN = Observation(Counts(2, 2), Goals(), layers=10, micro_batches=4)


def look(*attention: Measured, ffn: tuple[MeasuredFFN, ...] = (), epoch: int = 1, slots: int = 1) -> Look:
    by_name = {f"attention-{number}": measured for number, measured in enumerate(attention)}
    return Look(epoch, by_name, {f"ffn-{number}": measured for number, measured in enumerate(ffn)}, attention, slots)


def flights(count: int, attention_us: float = 100.0, ffn_us: float = 50.0, rows: int = 8, context: int = 800) -> Flights:
    """So many micro-batches, each of so many rows, and with a transfer of 20 us."""
    return Flights(count, count * rows, count * context, count * attention_us, count * ffn_us, count, count * 20.0)


def test_rates_are_of_the_time_between_two_looks_and_of_all_ranks_together() -> None:
    observer = Observer()
    observer.observe(KNOWN, look(rank(10, arrivals=100, output_tokens=1000), rank(10, arrivals=7, output_tokens=70)))
    later = look(rank(15, arrivals=110, output_tokens=1500), rank(20, arrivals=17, output_tokens=170))
    seen = observer.observe(KNOWN, later)
    assert (seen.arrivals_s, seen.output_tokens_s) == (10 / 5 + 10 / 10, 500 / 5 + 100 / 10)


def test_what_happened_before_the_first_look_is_not_of_this_period() -> None:
    seen = Observer().observe(KNOWN, look(rank(10, flights(5), arrivals=100, running=3, tpot_ms=histogram(20.0))))
    assert (seen.arrivals_s, seen.tpot_mean_ms, seen.stages) == (0.0, None, None)
    assert seen.running == 3


def test_a_rank_that_is_new_counts_from_its_second_look() -> None:
    observer = Observer()
    observer.observe(KNOWN, look(rank(10, arrivals=100)))
    assert observer.observe(KNOWN, look(rank(20, arrivals=110), rank(20, arrivals=50))).arrivals_s == 1.0
    assert observer.observe(KNOWN, look(rank(30, arrivals=120), rank(30, arrivals=70))).arrivals_s == 3.0


def test_the_present_is_summed_but_the_fullest_cache_and_the_longest_wait_count() -> None:
    one = rank(10, running=2, waiting=1, context_tokens=300, kv_used=10, kv_total=100, oldest_waiting_s=0.5)
    other = rank(10, running=3, waiting=0, context_tokens=500, kv_used=80, kv_total=100)
    seen = Observer().observe(KNOWN, look(one, other))
    assert (seen.running, seen.waiting, seen.context_tokens, seen.requests) == (5, 1, 800, 6)
    assert (seen.kv_used, seen.queue_wait_s) == (0.8, 0.5)


def test_quantiles_are_of_the_last_minute_and_the_mean_is_of_the_period() -> None:
    observer = Observer()
    observer.observe(KNOWN, look(rank(10, tpot_ms=histogram(*[40.0] * 90))))
    seen = observer.observe(KNOWN, look(rank(15, tpot_ms=histogram(*[40.0] * 90, *[80.0] * 10))))
    assert seen.tpot_mean_ms == pytest.approx(80.0)
    assert seen.tpot_ms is not None
    assert seen.tpot_ms.p50 == pytest.approx(40.0, rel=0.01)
    assert seen.tpot_ms.p95 == pytest.approx(80.0, rel=0.01)


def test_stages_are_a_layer_of_a_micro_batch_and_attention_is_the_slowest_rank() -> None:
    observer = Observer()
    ranks = rank(0), rank(0)
    observer.observe(KNOWN, look(*ranks, ffn=(ffn_rank(0), ffn_rank(0))))
    slow, quick = rank(5, flights(10, 100.0), wait_us=4000.0), rank(5, flights(10, 60.0), wait_us=8000.0)
    seen = observer.observe(KNOWN, look(slow, quick, ffn=(ffn_rank(5, 1000.0), ffn_rank(5, 3000.0)), slots=2))
    stages = seen.stages
    assert stages is not None
    assert (stages.attention, stages.ffn, stages.transfer) == (100.0, 50.0, 20.0)
    # 10 waves of 10 layers with two of them in flight: 50 times through a layer of both.
    assert (stages.attention_wait, stages.ffn_wait) == (6000 / 50, 2000 / 50)


def test_costs_are_learned_by_an_attention_rank_s_rows_and_by_the_rows_of_a_whole_wave() -> None:
    observer = Observer()
    for number in range(20):
        size = 2 ** (number % 5)
        counted = [flights(10 * number, 10 + 5.0 * size, 3 + 2.0 * 2 * size, size, 0) for size in (size, size)]
        before = [Flights() for _ in counted]
        observer.observe(KNOWN, look(*(rank(10 * number, own) for own in before)))
        seen = observer.observe(KNOWN, look(*(rank(10 * number + 5, own) for own in counted)))
    assert seen.costs is not None
    assert seen.costs.attention.duration_us(8) == pytest.approx(50, rel=0.1)
    assert seen.costs.ffn.duration_us(16) == pytest.approx(35, rel=0.1)


def test_nothing_is_learned_of_costs_across_two_epochs() -> None:
    observer = Observer()
    observer.observe(KNOWN, look(rank(0), epoch=1))
    seen = observer.observe(KNOWN, look(rank(5, flights(10)), epoch=2))
    assert seen.costs is not None
    assert not any(seen.costs.attention)
    assert seen.stages is not None
