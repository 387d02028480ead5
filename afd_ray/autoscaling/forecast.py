"""The load to come: what arrivals lead to, for each request stays as long as its answer takes."""

import math
from typing import Any, NamedTuple

from afd_ray.autoscaling.sizing import Demand
from afd_ray.autoscaling.values import Observation, State

LATEST_S, RECENT_S, USUAL_S = 20.0, 60.0, 600.0
"""Arrivals are averaged over three times, none longer than since the rate changed; what is older than one of them counts less than a third in it."""
LONG_S = 7200.0
"""So for the rate that times of more and of less come back to."""
ABOVE = 1.15
"""Times that rate: there is more now than there usually is."""
LENGTH_S = 1200.0
"""So for the length of answers and the context of requests, which change more slowly."""
UNLIKELY = 3.0
"""Standard deviations that chance hardly brings about: the recent rate is so far off the usual one only when that has changed."""
MOST_GROWTH = 3.0
"""So many times the present load at most: of few answers that ended the length may be wrong."""


class Forecast(NamedTuple):
    """What is to come."""

    demand: Demand
    risen: bool
    """There has been more than usually for a while, and who was late because it came has ended: the load will sooner fall than rise further."""
    memory: dict[str, Any]
    """The state to go on with."""


def forecast(observation: Observation, horizon_s: float, deviations: float, state: State, now: float) -> Forecast:
    """The demand to be ready for from `horizon_s` on, at the target's pace, and what to remember.

    With answers of L tokens, each T after the last, requests stay for W = L T, and by Little's law there will be as many as arrivals times W, with the context
    that requests usually have: those of a burst begin with little and grow. More than that are there by chance or from before, and of them exp(-h / W) are left
    in h; unless tokens are late, for then they are there for want of ranks. So capacity is asked for as soon as arrivals call for it, and what comes and goes
    around their mean does not move it. What chance may add to that mean is spared for (`Demand.spare`), but not once more for what it has added already. After a rise
    there is more to do for a while (`_made_up`).
    """
    memory: dict[str, Any] = dict(state)
    past = memory.get("forecast")
    elapsed_s = max(now - past["at"], 0.0) if past else math.inf
    rates = _rates(past, observation.arrivals_s, now)
    seen = {
        "tokens": observation.output_tokens_s,
        "ended": observation.completions_s,
        "context": observation.context_tokens,
        "running": observation.running,
    }
    slow = {name: _towards(past[name] if past else 0.0, value, elapsed_s / LENGTH_S) for name, value in seen.items()}
    long = _towards(past["long"], rates["usual"], elapsed_s / LONG_S) if past else rates["usual"]
    memory["forecast"] = {**rates, **slow, "long": long, "at": now}
    present, target_ms = Demand.of(observation), observation.goals.tpot_ms
    if not slow["tokens"] or not slow["ended"] or present.sequences <= 0:
        return Forecast(present.times(present.spare(deviations)), False, memory)
    stay_s = slow["tokens"] / slow["ended"] * target_ms / 1000
    to_come = rates["usual"] * stay_s * _made_up(rates, horizon_s, stay_s, now)
    mean = min(to_come, MOST_GROWTH * present.sequences)
    tpot_ms = observation.tpot_mean_ms or target_ms
    spans = horizon_s / (stay_s * tpot_ms / target_ms) if tpot_ms <= target_ms else 0.0
    sequences = max(mean * Demand(mean, 0.0).spare(deviations), _towards(present.sequences, mean, spans))
    each = slow["context"] / max(slow["running"], 1e-9)
    context = max(sequences * each, _towards(present.context_tokens, mean * each, spans))
    prompts = present.prompt_tokens_s * max(1.0, sequences / present.sequences)
    risen = rates["usual"] > ABOVE * long and not _is_recent(rates, horizon_s, stay_s, now)
    return Forecast(Demand(sequences, context, prompts), risen, memory)


def _rates(past: State | None, arrivals_s: float, now: float) -> dict[str, float]:
    """Requests a second, in the mean of the `latest`, `recent` and `usual` times; when the usual rate changed, and from what.

    When the recent rate is off the usual one by more than chance, the usual one is another from now on: at first what the latest arrivals say, for there is no time
    to lose, then the mean of what has come since.
    """
    if past is None:
        return {"latest": arrivals_s, "recent": arrivals_s, "usual": arrivals_s, "before": arrivals_s, "changed_at": now}
    since_change_s = now - past["changed_at"]
    since_s = max(since_change_s, LATEST_S)
    spans_s = {"latest": LATEST_S, "recent": min(since_s, RECENT_S), "usual": min(since_s, USUAL_S)}
    rates = {name: _towards(past[name], arrivals_s, (now - past["at"]) / span_s) for name, span_s in spans_s.items()}
    # Of Poisson arrivals: such a mean has the variance of a count over twice its time.
    chance = UNLIKELY * math.sqrt(max(rates["usual"], 1 / RECENT_S) / (2 * RECENT_S))
    if abs(rates["recent"] - rates["usual"]) <= chance:
        return {**rates, "before": past["before"], "changed_at": past["changed_at"]}
    before = min(past["before"], past["usual"]) if since_change_s < 2 * RECENT_S else past["usual"]
    return dict.fromkeys(spans_s, rates["latest"]) | {"before": before, "changed_at": now}


def _made_up(rates: State, horizon_s: float, stay_s: float, now: float) -> float:
    """How many times the steady load there is to do after a rise: the share of it that was not there before goes unserved for `horizon_s`, and is to be made up for
    while its requests are still here, or they end late however fast their last tokens come."""
    if not _is_recent(rates, horizon_s, stay_s, now) or rates["usual"] <= 0:
        return 1.0
    risen = max(0.0, 1 - rates["before"] / rates["usual"])
    return float(1 + risen * min(1.0, horizon_s / stay_s))


def _is_recent(rates: State, horizon_s: float, stay_s: float, now: float) -> bool:
    """Whether requests are still here that came before there were ranks for the rate that they came with."""
    return bool(now - rates["changed_at"] <= horizon_s + stay_s)


def _towards(start: float, end: float, spans: float) -> float:
    """Where a quantity that goes from `start` to `end` is after so many of its time constants."""
    return start + (end - start) * (1 - math.exp(-spans))
