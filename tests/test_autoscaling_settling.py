"""What keeps the built-in policies calm: cooldowns, bounds, deadlines, roll backs, growth in vain."""

import json
from dataclasses import replace

import pytest

from afd_ray.autoscaling.settling import Pace, consolidated, settle
from afd_ray.autoscaling.values import Counts, Decision, Goals, Observation, Outcome, Quantiles, Resize, State

SEEN = Observation(Counts(4, 4), Goals(most=Counts(8, 8)), running=20)
PACE = Pace(grow_after_s=0, shrink_after_s=100, grow_cooldown_s=10, shrink_cooldown_s=50, retry_s=60, most_shrink=1.0)


def ask(wanted: Counts, now: float, state: State | None = None, seen: Observation = SEEN, holds: bool = True) -> Decision:
    decision = settle(wanted, "why", seen, state or {}, now, lambda counts: holds, PACE)
    assert json.loads(json.dumps(decision.state)) is not None, "the state outlives a controller"
    return decision


def test_growth_is_at_once_and_within_bounds() -> None:
    assert ask(Counts(20, 5), 0.0).counts == Counts(8, 5)


def test_a_role_at_most_doubles() -> None:
    assert ask(Counts(8, 7), 0.0, seen=replace(SEEN, counts=Counts(3, 5))).counts == Counts(6, 7)


def test_one_role_grows_while_the_other_could_shrink() -> None:
    assert ask(Counts(2, 6), 0.0).counts == Counts(4, 6)


def test_ffn_ranks_come_in_whole_instances() -> None:
    goals = Goals(most=Counts(8, 9), ffn_step=4)
    assert ask(Counts(4, 5), 0.0, seen=replace(SEEN, goals=goals)).counts == Counts(4, 8)
    assert goals.bound(Counts(1, 50)) == Counts(1, 8)


def test_fewer_must_be_wanted_all_the_while_and_the_most_wanted_counts() -> None:
    state: State = {}
    for now, wanted in ((0.0, Counts(1, 1)), (50.0, Counts(3, 2)), (99.0, Counts(1, 1))):
        decision = ask(wanted, now, state)
        assert decision.counts == SEEN.counts
        state = json.loads(json.dumps(decision.state))
    assert ask(Counts(1, 1), 100.0, state).counts == Counts(3, 2)


def test_wanting_what_there_is_starts_the_wait_anew() -> None:
    state = ask(Counts(1, 1), 0.0).state
    state = ask(Counts(4, 4), 60.0, state).state
    state = ask(Counts(1, 1), 90.0, state).state
    assert ask(Counts(1, 1), 150.0, state).counts == SEEN.counts
    assert ask(Counts(1, 1), 190.0, state).counts == Counts(1, 1)


def test_what_was_wanted_before_that_time_is_over_for_each_role() -> None:
    state: State = {}
    for now, wanted in ((0.0, Counts(4, 1)), (30.0, Counts(1, 4)), (60.0, Counts(1, 1)), (90.0, Counts(1, 1))):
        state = ask(wanted, now, state).state
    assert ask(Counts(1, 1), 120.0, state).counts == Counts(1, 4)
    assert ask(Counts(1, 1), 140.0, state).counts == Counts(1, 1)


def test_what_fewer_ranks_would_not_hold_is_kept() -> None:
    state = ask(Counts(1, 1), 0.0).state
    assert ask(Counts(1, 1), 200.0, state, holds=False).counts == SEEN.counts


def test_one_reduction_takes_a_part_of_the_ranks_at_most() -> None:
    pace, state = replace(PACE, most_shrink=0.25), {"since": 0.0}
    assert settle(Counts(1, 1), "why", SEEN, state, 200.0, lambda counts: True, pace).counts == Counts(3, 3)
    idle = replace(SEEN, running=0)
    assert settle(Counts(1, 1), "why", idle, state, 200.0, lambda counts: True, pace).counts == Counts(1, 1)


def test_a_reduction_that_was_taken_back_is_not_tried_again_at_the_same_load() -> None:
    loaded = replace(SEEN, output_tokens_s=1000.0)
    state = ask(Counts(2, 4), 200.0, {"since": 0.0}, loaded).state
    state = ask(Counts(4, 4), 300.0, state, replace(loaded, counts=Counts(2, 4))).state
    assert ask(Counts(1, 1), 900.0, state, loaded).counts == Counts(4, 4)
    assert ask(Counts(1, 1), 900.0, state, replace(SEEN, output_tokens_s=500.0)).counts == Counts(1, 1)
    assert ask(Counts(1, 1), 9000.0, state, loaded).counts == Counts(1, 1)


def test_consolidation_stops_at_the_last_number_that_holds() -> None:
    def holds(counts: Counts) -> bool:
        return counts.attention >= 3 and counts.attention * counts.ffn >= 6

    assert consolidated(Counts(8, 8), Counts(1, 1), 1, holds) == Counts(3, 2)
    assert consolidated(Counts(8, 8), Counts(1, 1), 4, holds) == Counts(3, 4)


@pytest.mark.parametrize(("ago_s", "grows", "shrinks"), [(5, False, False), (20, True, False), (70, True, True)])
def test_cooldowns_after_a_resize(ago_s: float, grows: bool, shrinks: bool) -> None:
    seen = replace(SEEN, last_resize=Outcome(SEEN.counts, True, 1000 - ago_s))
    assert (ask(Counts(5, 5), 1000.0, seen=seen).counts == Counts(5, 5)) == grows
    state = {"since": 0.0}
    assert (ask(Counts(1, 1), 1000.0, state, seen).counts != SEEN.counts) == shrinks


def test_a_resize_under_way_is_waited_for_until_it_is_overdue() -> None:
    seen = replace(SEEN, goals=replace(SEEN.goals, resize_deadline_s=300.0), resize=Resize(Counts(6, 6), 0.0))
    waiting, overdue = ask(Counts(8, 8), 299.0, seen=seen), ask(Counts(8, 8), 301.0, seen=seen)
    assert (waiting.counts, waiting.give_up) == (SEEN.counts, False)
    assert (overdue.counts, overdue.give_up) == (SEEN.counts, True)


def test_after_a_roll_back_it_waits_before_it_tries_again() -> None:
    seen = replace(SEEN, last_resize=Outcome(Counts(6, 6), False, 1000.0))
    assert ask(Counts(6, 6), 1059.0, seen=seen).counts == SEEN.counts
    assert ask(Counts(6, 6), 1061.0, seen=seen).counts == Counts(6, 6)


def test_growth_in_vain_ends_after_two_and_begins_again_with_another_load() -> None:
    slow = replace(SEEN, tpot_ms=Quantiles(90, 100, 110))
    state: State = {}
    now, grown = 0.0, 0
    seen = slow
    for _ in range(6):
        decision = ask(Counts(8, 8), now, state, seen)
        grown += decision.counts != seen.counts
        state, seen = decision.state, replace(slow, last_resize=Outcome(SEEN.counts, True, now + 20))
        now += 100
    assert grown == 2
    assert ask(Counts(8, 8), now, state, replace(seen, running=60)).counts == Counts(8, 8)


def test_under_more_load_growth_was_not_in_vain() -> None:
    seen, now = replace(SEEN, tpot_ms=Quantiles(90, 100, 110)), 0.0
    state: State = {}
    for requests in (20, 24, 29, 35, 42):
        seen = replace(seen, running=requests)
        decision = ask(Counts(8, 8), now, state, seen)
        assert decision.counts == Counts(8, 8)
        state, seen = decision.state, replace(seen, last_resize=Outcome(SEEN.counts, True, now + 20))
        now += 100


def test_growth_that_helps_goes_on() -> None:
    state, now = ask(Counts(8, 8), 0.0, seen=replace(SEEN, tpot_ms=Quantiles(90, 100, 110))).state, 0.0
    for tpot in (90.0, 80.0, 70.0):
        now += 40
        seen = replace(SEEN, tpot_ms=Quantiles(tpot, tpot, tpot), last_resize=Outcome(SEEN.counts, True, now - 20))
        decision = ask(Counts(8, 8), now, state, seen)
        assert decision.counts == Counts(8, 8)
        state = decision.state
