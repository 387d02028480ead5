"""Policies that tests name as `tests.scaling_policies:NAME`."""

import time
from typing import Any

from afd_ray.autoscaling import Counts, Decision, Observation, State


def by_requests(observation: Observation, state: State, now: float) -> Decision:
    """A second attention rank for more than two requests, without any delay; counts its calls."""
    calls = state.get("calls", 0) + 1
    wanted = Counts(2 if observation.requests > 2 else 1, observation.counts.ffn)
    busy = observation.resize is not None or observation.override is not None
    return Decision(observation.counts if busy else wanted, f"{observation.requests} requests", {"calls": calls})


def larger(observation: Observation, state: State, now: float) -> Decision:
    """2A2F, whatever is under way."""
    return Decision(Counts(2, 2), "larger")


def larger_or_not(observation: Observation, state: State, now: float) -> Decision:
    """2A2F, and never mind as soon as that has begun."""
    given_up = observation.last_resize is not None
    return Decision(observation.counts if given_up else Counts(2, 2), "never mind", give_up=observation.resize is not None)


def too_large(observation: Observation, state: State, now: float) -> Decision:
    """More FFN instances than the test model has experts; once."""
    tried = observation.last_resize is not None
    return Decision(observation.counts if tried else Counts(1, 9), "too large")


def raises(observation: Observation, state: State, now: float) -> Decision:
    raise ZeroDivisionError("planted")


def nonsense(observation: Observation, state: State, now: float) -> Any:
    return {"attention": "many"}


def sleeps(observation: Observation, state: State, now: float) -> Decision:
    """Longer than any test."""
    time.sleep(10)
    return Decision(Counts(4, 4), "late")


def unsound(observation: Observation, state: State, now: float) -> Any:
    """Each of these in turn."""
    return (raises, nonsense, sleeps)[int(now * 10) % 3](observation, state, now)
