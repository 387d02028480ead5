"""From what a cluster measured to a profile of its stages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from afd_ray.measured import Flights, Measured
from afd_ray.simulation.serving import Profile
from afd_ray.simulation.serving.profiling import Facts, Look, Points, Trial, span_of, trials
from afd_ray.simulation.serving.stages import Shape

FACTS = Facts(
    attention=2,
    ffn=1,
    layers=4,
    token_budget=128,
    max_running=16,
    context_limit=512,
    kv_tokens=4096,
    vocab_size=64,
    bytes_per_row=100,
)


def look(flights: Flights, running: int = 2, completions: int = 0, prompt_tokens: int = 16) -> Look:
    rank = Measured(
        0.0, 1.0, running=running, completions=completions, prompt_tokens=prompt_tokens, steps=flights.count, flights=flights
    )
    return Look(1, {"attention-0": rank})


def flown(count: int, rows: int = 8, context: int = 800, attention_us: float = 50.0) -> Flights:
    """So many micro-batches, all alike."""
    return Flights(count, count * rows, count * context, count * attention_us, count * 90.0, count, count * 12.0)


# --- trials ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [FACTS, replace(FACTS, kv_tokens=64), replace(FACTS, context_limit=40)])
def test_every_trial_fits_the_cluster(facts: Facts) -> None:
    planned = list(trials(facts, 24))
    assert planned
    for trial in planned:
        each = trial.requests // facts.attention
        assert each <= facts.max_running
        assert trial.prompt + trial.output <= facts.context_limit
        assert each * (trial.prompt + trial.output) <= facts.kv_tokens


def test_each_number_of_rows_is_tried_with_short_and_long_contexts() -> None:
    decoding = [trial for trial in trials(FACTS, 24) if not trial.of_prompts]
    assert {trial.requests // 2 for trial in decoding} == {0, 1, 2, 4, 8, 16}, "0: a request for one of the two ranks"
    for rows in (1, 2, 4, 8):
        short, long = sorted(trial.prompt for trial in decoding if trial.requests == 2 * rows)
        assert long > 10 * short


# --- what of a trial counts ------------------------------------------------------------------------------------------------------


def test_only_steps_in_which_all_decode_are_measured() -> None:
    looks = [
        look(flown(0), running=0, prompt_tokens=0),
        look(flown(3), prompt_tokens=9),
        look(flown(10)),
        look(flown(50)),
        look(flown(60), running=1, completions=1),
    ]
    (span,) = span_of(Trial(2, 8, 50), looks)
    assert span.count == 40


def test_how_much_stages_differ_is_told_where_micro_batches_could_be_compared() -> None:
    points = Points(FACTS)
    for requests, compared_us in ((2, 0.0), (4, 400.0)):
        span = replace(flown(10), attention_changes_us=compared_us / 4, attention_compared_us=compared_us)
        points.add(Trial(requests, 8, 50), [replace(span, ffn_changes_us=compared_us / 8, ffn_compared_us=compared_us)])
    found = points.dump({})
    assert [point.get("spread") for point in found["attention"]] == [None, 0.25]
    assert [point.get("spread") for point in found["ffn"]] == [None, 0.125]


def test_a_trial_during_which_others_ran_is_left_out() -> None:
    trial = Trial(2, 8, 50)
    assert not span_of(trial, [look(flown(10), running=3), look(flown(50), running=3)])


def test_of_prompts_alone_all_is_measured() -> None:
    (span,) = span_of(Trial(1, 128, 1), [look(flown(5), running=0), look(flown(6, rows=128), running=0, completions=1)])
    assert span.count == 1


# --- the file ----------------------------------------------------------------------------------------------------------------------


def test_the_simulator_reads_back_what_was_measured(tmp_path: Path) -> None:
    points = Points(FACTS)
    for context, us in ((80, 42.0), (800, 60.0)):
        points.add(Trial(2, context // 8, 50), [flown(20, 8, context, us), flown(20, 8, context, us)])
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(points.dump({"of": "a test"})))
    profile = Profile.read(path)
    fixed_us, per_token_us = profile.attention_us(8)
    assert (fixed_us, per_token_us) == (pytest.approx(40), pytest.approx(0.025))
    assert profile.ffn_us(16, Shape(1)) == pytest.approx(90), "the FFN computes the rows of both ranks"
    assert profile.transfer_us(8) == pytest.approx(12)


def test_rows_measured_with_one_context_take_the_slope_of_those_around() -> None:
    profile = Profile([(4, 100, 20.0), (4, 1100, 40.0), (5, 600, 35.0), (8, 100, 30.0), (8, 1100, 50.0)], [(1, 10.0, 1)], [])
    fixed_us, per_token_us = profile.attention_us(5)
    assert per_token_us == pytest.approx(0.02)
    assert fixed_us == pytest.approx(35 - 0.02 * 600)


def test_of_several_measurements_at_one_point_the_median_counts() -> None:
    profile = Profile([(1, 10, 5.0)], [(4, 10.0, 1), (4, 90.0, 1), (4, 12.0, 1), (8, 20.0, 1)], [(4, 3.0), (4, 5.0), (4, 400.0)])
    assert (profile.ffn_us(4, Shape(1)), profile.transfer_us(4)) == (12.0, 5.0)
