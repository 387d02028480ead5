"""The load to come: requests come at the rate that they come at now, and each stays for as long as its answer takes."""

import math
from typing import Any

from afd_ray.autoscaling.values import Observation, State

RATE_S = 60.0
"""Arrivals that are older count less than a third."""
LENGTH_S = 1200.0
"""So for the length of answers, which changes more slowly."""
MOST_GROWTH = 3.0


def forecast_growth(
    observation: Observation, present: float, horizon_s: float, state: State, now: float
) -> tuple[float, dict[str, Any]]:
    """How many times the `present` requests are to be expected in `horizon_s` (at least 1, at most MOST_GROWTH), and what to remember.

    With answers of L tokens, each T after the last, requests stay for W = L T, and by Little's law their number goes from what it is towards
    arrivals times W, by 1 - exp(-h / W) of the way in h. It follows a burst later than arrivals do, so that they foretell it.
    """
    memory: dict[str, Any] = dict(state)
    past = memory.get("forecast")
    elapsed_s = max(now - past["at"], 0.0) if past else math.inf
    seen = {"arrivals": observation.arrivals_s, "tokens": observation.output_tokens_s, "ended": observation.completions_s}
    spans = {"arrivals": RATE_S, "tokens": LENGTH_S, "ended": LENGTH_S}
    smooth = {name: _towards(past[name] if past else 0.0, seen[name], elapsed_s / spans[name]) for name in seen}
    memory["forecast"] = {**smooth, "at": now}
    if not smooth["ended"] or present <= 0:
        return 1.0, memory
    stay_s = smooth["tokens"] / smooth["ended"] * observation.goals.tpot_ms / 1000
    # Both must say it: what came last may be chance, and the mean remembers a burst for a while after it is over.
    rate = min(smooth["arrivals"], observation.arrivals_s)
    expected = _towards(present, rate * stay_s, horizon_s / max(stay_s, 1e-9))
    return min(MOST_GROWTH, max(1.0, expected / present)), memory


def _towards(start: float, end: float, spans: float) -> float:
    """Where a quantity that goes from `start` to `end` is after so many of its time constants."""
    return start + (end - start) * (1 - math.exp(-spans))
