"""A policy that raises, answers nonsense or takes too long changes nothing."""

import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from afd_ray.autoscaling import Counts, Decision, Goals, Guard, Observation, Override, State, decide, load_policy
from tests.serving_scenes import play, small, steady

SEEN = Observation(Counts(2, 3), Goals(most=Counts(4, 4)))
REMEMBERED = {"since": 3.0}


def raises(observation: Observation, state: State, now: float) -> Decision:
    raise ZeroDivisionError("a policy's own\nfault")


_ROUND: dict[str, Any] = {}
_ROUND["itself"] = _ROUND
NONSENSE = {
    "None": None,
    "a number": 5,
    "no counts": Decision(None, "?"),  # type: ignore[arg-type]
    "negative": Decision(Counts(-1, 2), "?"),
    "a fraction": Decision(Counts(1.5, 2), "?"),  # type: ignore[arg-type]
    "not a number": Decision(Counts(float("nan"), 2), "?"),  # type: ignore[arg-type]
    "a truth": Decision(Counts(True, 2), "?"),
    "three roles": Decision((1, 2, 3), "?"),  # type: ignore[arg-type]
    "no state": Decision(Counts(1, 1), "?", None),  # type: ignore[arg-type]
    "state that is no JSON": Decision(Counts(1, 1), "?", {"seen": {1, 2}}),
    "a state that goes round": Decision(Counts(1, 1), "?", _ROUND),
    "a huge state": Decision(Counts(1, 1), "?", {"all": list(range(100_000))}),
    "no reason": Decision(Counts(1, 1), 5),  # type: ignore[arg-type]
}


def test_a_policy_that_exits_ends_nothing() -> None:
    decision = decide(lambda observation, state, now: sys.exit(7), SEEN, REMEMBERED, 0.0)
    assert (decision.failed, decision.reason) == (True, "the policy raised SystemExit: 7")


def test_a_policy_that_raises_leaves_all_as_it_is() -> None:
    decision = decide(raises, SEEN, REMEMBERED, 0.0)
    assert (decision.counts, decision.state) == (SEEN.counts, REMEMBERED)
    assert decision.reason == "the policy raised ZeroDivisionError: a policy's own fault"


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_leaves_all_as_it_is(name: str) -> None:
    def policy(observation: Observation, state: State, now: float) -> Any:
        return NONSENSE[name]

    decision = decide(policy, SEEN, REMEMBERED, 0.0)
    assert (decision.counts, decision.state) == (SEEN.counts, REMEMBERED)
    assert decision.reason.startswith("the policy")


def test_counts_outside_the_bounds_are_brought_within() -> None:
    decision = decide(lambda o, s, t: Decision(Counts(100, 1), "all"), SEEN, {}, 0.0)
    assert decision.counts == Counts(4, 1)
    assert decision.reason == "all; 100A1F is outside the bounds"


def test_a_policy_that_takes_too_long_is_not_waited_for() -> None:
    gate = threading.Event()

    def slow(observation: Observation, state: State, now: float) -> Decision:
        gate.wait(10)
        return Decision(Counts(4, 4), "late")

    guard = Guard(slow, deadline_s=0.05)
    assert guard.decide(SEEN, 0.0).reason == "the policy did not answer in 0.05 s"
    assert guard.decide(SEEN, 1.0).reason == "the policy is still busy with an earlier question"
    gate.set()
    assert guard.decide(SEEN, 2.0).counts in (SEEN.counts, Counts(4, 4))


def test_a_late_answer_is_dropped() -> None:
    gate, asked = threading.Event(), []

    def slow_once(observation: Observation, state: State, now: float) -> Decision:
        asked.append(now)
        if len(asked) == 1:
            gate.wait(10)
        return Decision(Counts(len(asked), 4), "answer", {"asked": len(asked)})

    guard = Guard(slow_once, deadline_s=0.05)
    guard.decide(SEEN, 0.0)
    gate.set()
    question = guard._asked
    assert question is not None
    assert question.answered.wait(10)
    guard = Guard(slow_once, deadline_s=10, state=guard.state)
    assert guard.decide(SEEN, 5.0).counts == Counts(2, 4)
    assert guard.state == {"asked": 2}


def test_serving_goes_on_as_without_a_policy() -> None:
    def served(policy: Any) -> dict[str, Any]:
        return play(policy, steady(1, 60), small(Counts(2, 2))).summary() | {"failed_decisions": 0}

    without = served(load_policy("fixed"))
    assert served(raises) == without
    for answer in NONSENSE.values():
        assert served(lambda o, s, t, answer=answer: answer) == without


def test_failures_are_counted_and_an_operators_word_is_none() -> None:
    assert decide(raises, SEEN, {}, 0.0).failed
    by_hand = replace(SEEN, override=Override(SEEN.counts, 900.0))
    assert not decide(lambda o, s, t: Decision(Counts(1, 1), "mine"), by_hand, {}, 0.0).failed
    outcome = play(raises, steady(1, 60), small(Counts(2, 2)))
    assert outcome.failures.always
    assert outcome.failures.last == "the policy raised ZeroDivisionError: a policy's own fault"
    assert not play(load_policy("fixed"), steady(1, 60), small(Counts(2, 2))).failures.failed
