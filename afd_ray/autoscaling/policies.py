"""The built-in policies: from what is observed to the counts that are wanted."""

import math
from typing import Any

from afd_ray.autoscaling.forecast import forecast_growth
from afd_ray.autoscaling.settling import JUDGED_AFTER_S, KV_FULL, WAIT_SHARE, Pace, settle, waits_too_long
from afd_ray.autoscaling.sizing import Demand, Sizing, least_for_kv
from afd_ray.autoscaling.values import Counts, Decision, Observation, State

MARGIN = 0.95
"""The share of the TPOT target that ranks are counted for: the rest is for what comes before the next decision."""
DEVIATIONS = 1.0
"""Requests come and go: ranks are counted for so many standard deviations more of them than there are."""
KV_WANTED = 0.75
"""Share of the KV blocks that attention ranks are counted for."""
SHRINK_MARGIN = 0.95
"""Fewer ranks must do so much better than what would do."""
TRIM_GAIN, TRIM_LOSS = 0.05, 0.02
"""Weight of the newest measurement in what the closed form is off by: when that is more than was thought, and when it is less. It is to be a mean, not
what a burst between two looks makes of it; but it shows when ranks are busy, and more of them must not make it forgotten at once."""
MOST_ERROR = 1.5


def fixed(observation: Observation, state: State, now: float) -> Decision:
    """What serves, serves."""
    return Decision(observation.counts, "fixed", state)


def queue(observation: Observation, state: State, now: float) -> Decision:
    """As a stock autoscaler: replicas by ongoing requests, the ratio of the roles as it was at first.

    Options: `ongoing_per_attention` (default 32) requests for each attention rank, and the delays of `Pace`.
    """
    goals = observation.goals
    memory = {"ratio": observation.counts.ffn / observation.counts.attention, **state}
    per_rank = goals.options.get("ongoing_per_attention", 32.0)
    attention = math.ceil(observation.requests / per_rank)
    wanted = goals.bound(Counts(attention, math.ceil(max(1, attention) * memory["ratio"] - 1e-9)))
    pace = Pace.of(observation, grow_after_s=30.0, shrink_after_s=600.0, shrink_cooldown_s=0.0, grow_cooldown_s=0.0)
    why = f"{observation.requests} requests of {per_rank:g} for each attention rank"
    return settle(wanted, why, observation, memory, now, lambda counts: True, pace)


def tpot(observation: Observation, state: State, now: float) -> Decision:
    """Target tracking: both roles in proportion to how far TPOT is off its target; needs no model of the stages.

    TPOT is known over a minute: who grows again before that is over answers to what was before the last growth.
    """
    goals, current = observation.goals, observation.counts
    pace = Pace.of(observation, most_shrink=0.25, grow_cooldown_s=JUDGED_AFTER_S)

    def holds(counts: Counts) -> bool:
        share = max(current.attention / counts.attention, current.ffn / counts.ffn)
        reached = observation.tpot_ms.p95 * share if observation.tpot_ms else 0.0
        return observation.requests == 0 or (reached <= goals.tpot_ms * MARGIN and observation.kv_used * share <= KV_FULL)

    pressure, why = _pressure(observation)
    if observation.requests == 0:
        wanted = goals.least
    elif pressure > 1:
        wanted = Counts(math.ceil(current.attention * min(pressure, 2.0)), math.ceil(current.ffn * min(pressure, 2.0)))
    else:
        wanted = Counts(*(max(1, math.ceil(count * pressure / MARGIN)) for count in current))
    return settle(wanted, why, observation, state, now, holds, pace)


def balance(observation: Observation, state: State, now: float) -> Decision:
    """The closed-form counts for the present load, corrected by which half waits for the other."""
    return _balanced(observation, state, now, 1.0, "")


def predictive(observation: Observation, state: State, now: float) -> Decision:
    """As `balance`, for the load to be expected when ranks that are asked for now will serve."""
    horizon_s = observation.start_delay_s + observation.goals.options.get("lookahead_s", 30.0)
    growth, remembered = forecast_growth(observation, Demand.of(observation).sequences, horizon_s, state, now)
    note = f", {growth:.2f} times that in {horizon_s:.0f} s" if growth > 1 else ""
    return _balanced(observation, remembered, now, growth, note)


BUILT_IN = {"fixed": fixed, "queue": queue, "tpot": tpot, "balance": balance, "predictive": predictive}


def _balanced(observation: Observation, state: State, now: float, growth: float, note: str) -> Decision:
    memory: dict[str, Any] = dict(state)
    sizing = Sizing.of(observation, *_trims(observation, memory))
    if sizing is None or not observation.requests:
        return _unmeasured(observation, memory, now)
    goals = observation.goals
    demand = Demand.of(observation)
    deviations = goals.options.get("deviations", DEVIATIONS)
    expected = demand.times(max(growth, demand.spare(deviations)))
    margin = goals.options.get("margin", MARGIN)

    def holds(counts: Counts) -> bool:
        kv = least_for_kv(observation, KV_FULL) * growth
        reached = sizing.tpot_ms(counts, expected, goals.tpot_ms)
        unreachable = sizing.tpot_ms(goals.most, expected, goals.tpot_ms) > goals.tpot_ms
        # Of a target that all ranks together miss, fewer may miss it too, but hardly by more.
        limit = (
            sizing.tpot_ms(observation.counts, expected, goals.tpot_ms) * 1.02
            if unreachable
            else goals.tpot_ms * margin * SHRINK_MARGIN
        )
        return reached <= limit and counts.attention >= kv

    needed = sizing.needed(expected, goals.tpot_ms * margin)
    why = f"{demand.sequences:.0f} requests of {demand.context_tokens / max(1, demand.sequences):.0f} tokens{note}"
    if needed is None:
        needed, why = _best_effort(sizing, expected, observation), f"{why}; {goals.tpot_ms:g} ms are out of reach"
    kv = math.ceil(least_for_kv(observation, KV_WANTED) * growth)
    wanted = Counts(max(needed.attention, kv, _for_queue(observation)), needed.ffn)
    return settle(wanted, f"{why} need {wanted}", observation, memory, now, holds, Pace.of(observation))


def _unmeasured(observation: Observation, memory: State, now: float) -> Decision:
    """Without requests, or before any stage has run: the least that is allowed if nothing is asked, else what there is, or more when requests wait."""
    idle = observation.requests == 0
    wanted = observation.goals.least if idle else Counts(_for_queue(observation), observation.counts.ffn)
    why = "no requests" if idle else "no stage was measured yet"
    return settle(wanted, why, observation, memory, now, lambda counts: idle, Pace.of(observation))


def _best_effort(sizing: Sizing, demand: Demand, observation: Observation) -> Counts:
    """Where no number of ranks reaches the target: the fewest from which more would gain less than a twentieth."""
    goals = observation.goals
    best = sizing.tpot_ms(goals.most, demand, goals.tpot_ms)
    return sizing.needed(demand, best * 1.05) or observation.counts


def _for_queue(observation: Observation) -> int:
    """Attention ranks for the requests that wait too long to be admitted: as many again for each share of those that run."""
    current = observation.counts.attention
    if not waits_too_long(observation):
        return 1
    return math.ceil(current * min(2.0, max(1 + 1 / current, observation.requests / max(1, observation.running))))


def _pressure(observation: Observation) -> tuple[float, str]:
    """The worst of TPOT over its target, and of the queue's wait over its share of the TTFT target."""
    goals = observation.goals
    by_tpot = observation.tpot_ms.p95 / goals.tpot_ms if observation.tpot_ms else 0.0
    by_wait = (observation.queue_wait_s or 0.0) * 1000 / (WAIT_SHARE * goals.ttft_ms)
    by_kv = observation.kv_used / KV_FULL
    pressure = max(by_tpot, by_wait, by_kv)
    names = {by_tpot: "TPOT", by_wait: "queue wait", by_kv: "KV use"}
    return pressure, f"{names[pressure]} at {pressure:.2f} of what is allowed" if pressure else "no requests"


def _trims(observation: Observation, memory: dict[str, Any]) -> tuple[float, float]:
    """How much more the halves cost than their lines say, by measured over predicted TPOT: the half that the other waits for gets the greater part."""
    error, stages, measured = memory.get("error", 1.0), observation.stages, observation.tpot_mean_ms
    sizing = Sizing.of(observation)
    if sizing is not None and stages is not None and measured is not None and observation.resize is None:
        present = Demand(observation.running, observation.context_tokens, observation.prompt_tokens_s)
        expected = sizing.tpot_ms(observation.counts, present, measured)
        found = min(MOST_ERROR, max(1.0, measured / expected))
        error += (TRIM_GAIN if found > error else TRIM_LOSS) * (found - error)
        waits = stages.attention_wait + stages.ffn_wait
        memory["ffn_part"] = stages.attention_wait / waits if waits else 0.5
    memory["error"] = error
    ffn_part = memory.get("ffn_part", 0.5)
    return 1 + 2 * (error - 1) * (1 - ffn_part), 1 + 2 * (error - 1) * ffn_part
