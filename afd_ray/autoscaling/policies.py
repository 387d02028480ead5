"""The built-in policies: from what is observed to the counts that are wanted."""

import math
from typing import Any

from afd_ray.autoscaling.forecast import forecast
from afd_ray.autoscaling.lateness import learned_margin
from afd_ray.autoscaling.settling import JUDGED_AFTER_S, KV_FULL, WAIT_SHARE, Pace, settle, waits_too_long
from afd_ray.autoscaling.sizing import Demand, Sizing, least_for_kv
from afd_ray.autoscaling.values import Counts, Decision, Goals, Observation, State

MARGIN = 0.95
"""The share of the TPOT target that `tpot` counts ranks for."""
DEVIATIONS = 1.0
"""Requests come and go: ranks are counted for so many standard deviations more of them than there are."""
KV_WANTED = 0.75
"""Share of the KV blocks that attention ranks are counted for."""
SHRINK_MARGIN = 0.95
"""Fewer ranks must do so much better than what would do."""
HARDLY = 1.02
"""Times as long as now."""
TRIM_GAIN = 0.03
"""Weight of the newest measurement in what the closed form is off by: it is to be a mean, not what a burst between two looks makes of it."""
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
    demand = Demand.of(observation)
    return _balanced(observation, state, now, demand.times(demand.spare(_deviations(observation))), "")


def predictive(observation: Observation, state: State, now: float) -> Decision:
    """As `balance`, for the load that arrivals lead to, from when ranks that are asked for now will serve."""
    horizon_s = observation.start_delay_s + observation.goals.options.get("lookahead_s", 30.0)
    to_come = forecast(observation, horizon_s, _deviations(observation), state, now)
    note = f", {to_come.demand} in {horizon_s:.0f} s"
    return _balanced(observation, to_come.memory, now, to_come.demand, note, to_come.risen)


BUILT_IN = {"fixed": fixed, "queue": queue, "tpot": tpot, "balance": balance, "predictive": predictive}


def _deviations(observation: Observation) -> float:
    return observation.goals.options.get("deviations", DEVIATIONS)


def _balanced(observation: Observation, state: State, now: float, expected: Demand, note: str, risen: bool = False) -> Decision:
    memory: dict[str, Any] = dict(state)
    sizing = Sizing.of(observation, *_trims(observation, memory))
    if sizing is None or not observation.requests:
        return _unmeasured(observation, memory, now)
    goals, present = observation.goals, Demand.of(observation)
    kv_growth = max(1.0, expected.context_tokens / max(1.0, present.context_tokens))
    margin = learned_margin(observation, memory, now, risen)

    def holds(counts: Counts) -> bool:
        kept = counts.attention >= least_for_kv(observation, KV_FULL / kv_growth)
        return kept and _fast_enough(counts, sizing, expected, goals, margin)

    needed, why = sizing.needed(expected, goals.tpot_ms * margin), f"{present}{note}"
    if needed is None:
        needed, why = _best_effort(sizing, expected, observation), f"{why}; {goals.tpot_ms:g} ms are out of reach"
    kv = least_for_kv(observation, KV_WANTED / kv_growth)
    wanted = Counts(max(needed.attention, kv, _for_queue(observation)), needed.ffn)
    return settle(wanted, f"{why} need {wanted}", observation, memory, now, holds, Pace.of(observation))


def _fast_enough(counts: Counts, sizing: Sizing, expected: Demand, goals: Goals, margin: float) -> bool:
    """Whether so many ranks, fewer than now, would do: somewhat better than what is asked. Where the other half is what keeps tokens from coming sooner, it is enough that
    they come hardly later than now, and that the half of which there would be less does somewhat better by itself. Of a target that all ranks together miss,
    fewer may miss it too, but hardly by more."""

    def reached(ranks: Counts) -> float:
        return sizing.tpot_ms(ranks, expected, goals.tpot_ms)

    now, most, limit_ms = sizing.at, goals.most, goals.tpot_ms * margin
    fewer_ms, hardly_later_ms, better_ms = reached(counts), reached(now) * HARDLY, limit_ms * SHRINK_MARGIN
    if reached(most) > goals.tpot_ms:
        return fewer_ms <= hardly_later_ms
    if fewer_ms > max(better_ms, min(limit_ms, hardly_later_ms)):
        return False
    alone = []
    if counts.attention < now.attention:
        alone.append(counts._replace(ffn=most.ffn))
    if counts.ffn < now.ffn:
        alone.append(counts._replace(attention=most.attention))
    return all(reached(half) <= better_ms for half in alone)


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
        error += TRIM_GAIN * (min(MOST_ERROR, max(1 / MOST_ERROR, measured / expected)) - error)
        waits = stages.attention_wait + stages.ffn_wait
        memory["ffn_part"] = stages.attention_wait / waits if waits else 0.5
    memory["error"] = error
    ffn_part = memory.get("ffn_part", 0.5)
    return 1 + 2 * (error - 1) * (1 - ffn_part), 1 + 2 * (error - 1) * ffn_part
