"""The known failures of autoscalers (ai-dynamo/dynamo #6985, #14251, #9294, #8861, #10528, #11624, #9774, #4420): each shown with a naive policy, and
not to happen with the built-in ones."""

from itertools import chain

import pytest

from afd_ray.autoscaling import Counts, Override, load_policy
from afd_ray.autoscaling.guard import checked
from afd_ray.autoscaling.values import Decision, Goals, Observation
from afd_ray.simulation.serving import Arrival, Simulation
from tests.serving_scenes import LAYERS, MOST, by_completions, by_threshold, counts_at, play, small, steady

OURS = ["tpot", "balance", "predictive"]
LONG_AFTER = [Arrival(3600.0, 10, 2)]


# --- 1. no scale-down at zero traffic --------------------------------------------------------------------------------------


def test_naive_never_shrinks_when_nothing_comes_any_more() -> None:
    outcome = play(by_threshold, chain(steady(5, 120), LONG_AFTER), small(Counts(4, 4)))
    assert counts_at(outcome, 3500) != Counts(1, 1)


@pytest.mark.parametrize("name", OURS)
def test_without_traffic_it_shrinks_to_the_minimum(name: str) -> None:
    outcome = play(load_policy(name), chain(steady(5, 120), LONG_AFTER), small(Counts(4, 4)))
    assert counts_at(outcome, 600) == Counts(1, 1)


# --- 2. from N to N-1 and back -----------------------------------------------------------------------------------------------

BETWEEN = 2.0
"""Requests a second that N ranks hold easily and N-1 do not."""


def test_naive_goes_back_and_forth() -> None:
    assert play(by_threshold, steady(BETWEEN, 1200), small(Counts(2, 2))).summary()["reversals"] >= 20


@pytest.mark.parametrize("name", OURS)
def test_it_does_not_shrink_to_what_would_not_hold(name: str) -> None:
    assert play(load_policy(name), steady(BETWEEN, 1200), small(Counts(2, 2))).summary()["reversals"] <= 2


# --- 3. completion rate hides saturation --------------------------------------------------------------------------------------

FEW_BLOCKS = 100
"""Of 16 tokens: about 8 requests fit into a rank, the others queue."""


def test_naive_does_not_see_the_queue() -> None:
    outcome = play(by_completions, steady(3, 300), small(blocks=FEW_BLOCKS))
    assert max(point.waiting for point in outcome.points) > 300


@pytest.mark.parametrize("name", OURS)
def test_a_queue_makes_it_grow(name: str) -> None:
    outcome = play(load_policy(name), steady(3, 300), small(blocks=FEW_BLOCKS))
    naive = play(by_completions, steady(3, 300), small(blocks=FEW_BLOCKS))
    assert max(point.waiting for point in outcome.points) < max(point.waiting for point in naive.points) / 2
    assert outcome.points[-1].waiting == 0


# --- 4. a target out of reach --------------------------------------------------------------------------------------------------

OUT_OF_REACH = {
    "autoscaling": {"tpot_target_ms": 1.0, "ttft_target_ms": 1000.0, "max": MOST._asdict(), "options": {"shrink_after_s": 60.0}}
}


def test_naive_takes_all_there_is_for_a_target_that_nothing_reaches() -> None:
    outcome = play(by_threshold, steady(0.6, 900), small(**OUT_OF_REACH))
    assert counts_at(outcome, 890) == MOST


@pytest.mark.parametrize("name", OURS)
def test_a_target_out_of_reach_is_not_chased(name: str) -> None:
    outcome = play(load_policy(name), chain(steady(0.6, 900), LONG_AFTER), small(**OUT_OF_REACH))
    assert sum(counts_at(outcome, 890)) < sum(MOST)
    assert counts_at(outcome, 3500) == Counts(1, 1), "nor does it freeze the counts"


# --- 5. the operator ---------------------------------------------------------------------------------------------------------------


def by_hand(at_s: float) -> Observation:
    return Observation(
        Counts(6, 6), Goals(most=MOST), running=1, context_tokens=100, layers=LAYERS, override=Override(Counts(6, 6), at_s + 900)
    )


def test_naive_undoes_what_an_operator_set() -> None:
    assert by_completions(by_hand(0.0), {}, 0.0).counts != Counts(6, 6)


@pytest.mark.parametrize("name", OURS)
def test_what_an_operator_set_stays_until_its_time_is_over(name: str) -> None:
    simulation = Simulation(small(), chain(steady(1, 2400), [Arrival(2500, 10, 2)]), load_policy(name))
    simulation.at(300, lambda: simulation.set_by_hand(Counts(6, 6)))
    outcome = simulation.run()
    assert counts_at(outcome, 350) == counts_at(outcome, 1190) == Counts(6, 6)
    assert sum(counts_at(outcome, 1800)) < 12


def test_the_guard_holds_any_policy_to_it() -> None:
    kept = checked(Decision(Counts(1, 1), "mine"), by_hand(0.0), {})
    assert kept.counts == Counts(6, 6)
    assert "by hand" in kept.reason
