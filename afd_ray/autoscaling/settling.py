"""From the counts that a policy would like to a decision that can be acted on: what keeps every built-in policy calm."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import gt
from typing import Any

from afd_ray.autoscaling.values import Counts, Decision, Observation, State

Holds = Callable[[Counts], bool]
"""Whether so many ranks would hold the target under the present load."""

FUTILE_GAIN = 0.05
"""Growth that lowers TPOT by a smaller part was in vain."""
JUDGED_AFTER_S = 60.0
"""What is known of TPOT is over the last minute: by then all of it is from after a growth."""
GROWN_LOAD = 1.05
"""So many times a load is more than it was: then TPOT says nothing of what growth was good for, and growth nothing of the reduction before."""
MOST_FUTILE = 2
"""After so many growths in vain the target is held to be out of reach."""
KV_FULL = 0.9
"""Share of KV blocks above which fewer attention ranks would have to preempt requests."""
SAME_LOAD = 0.7
"""A load of at least this part of another one is as much as that."""
WAIT_SHARE = 0.5
"""Of the TTFT target; a request that waits longer calls for attention ranks."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast counts may follow the load, seconds."""

    grow_after_s: float = 0.0
    """More ranks must have been wanted for so long."""
    shrink_after_s: float = 300.0
    """The most ranks wanted in so long a time are left: a role's, whatever the other's."""
    most_shrink: float = 0.5
    """The part of a role's ranks that one reduction takes at most, while there are requests."""
    regret_s: float = 900.0
    """Who grows again so soon after a reduction should not have shrunk: for four times as long not below those counts again, at no less load."""
    grow_cooldown_s: float = 15.0
    """Between one growth's end and the next."""
    shrink_cooldown_s: float = 60.0
    """Between any change's end and a reduction."""
    most_growth: float = 2.0
    """A role grows to so many times its ranks at most, in one resize."""
    retry_s: float = 60.0
    """After a resize was rolled back, until another one is asked for."""
    futile_s: float = 900.0
    """How long a target is held to be out of reach, unless the load changes by half."""

    @classmethod
    def of(cls, observation: Observation, **defaults: float) -> "Pace":
        """The policy's own defaults, with what `autoscaling.options` says instead."""
        names = set(cls.__dataclass_fields__)
        options = {name: value for name, value in observation.goals.options.items() if name in names}
        return cls(**{**defaults, **options})


def hold(observation: Observation, reason: str, state: State, give_up: bool = False) -> Decision:
    """Everything stays as it is."""
    return Decision(observation.counts, reason, state, give_up)


def settle(
    wanted: Counts, why: str, observation: Observation, state: State, now: float, holds: Holds, pace: Pace | None = None
) -> Decision:
    """The decision for what a policy wants.

    Nothing while a resize is under way (given up when it is overdue), while an operator's override lasts, or after a resize was rolled back; no growth
    beyond the bounds, in vain, or sooner than the pace allows; no reduction that was not wanted all the while, or that `holds` denies.
    """
    pace = pace or Pace()
    memory: dict[str, Any] = dict(state)
    current, wanted = observation.counts, observation.goals.bound(wanted)
    wanted = wanted._replace(attention=_attention(wanted, observation))
    peak = _most_wanted(wanted, memory, now, pace.shrink_after_s)
    pause = _reason_to_pause(observation, now, pace)
    if pause is not None:
        memory.pop("more_since", None)
        return hold(observation, pause, memory, give_up=_overdue(observation, now))
    _note_growth_in_vain(memory, observation, now, pace)
    limit = observation.goals.bound(Counts(*(math.ceil(count * pace.most_growth) for count in current)))
    more = Counts(*(max(count, min(most, asked)) for count, most, asked in zip(current, limit, wanted, strict=True)))
    if more != current:
        return _grow(more, why, observation, memory, now, pace)
    memory.pop("more_since", None)
    if wanted == current:
        return hold(observation, why, memory)
    return _shrink(peak, why, observation, memory, now, pace, holds)


def _attention(wanted: Counts, observation: Observation) -> int:
    """Attention ranks wanted: never fewer while requests wait long or the KV cache is full."""
    pressed = observation.kv_used > KV_FULL or waits_too_long(observation)
    return max(wanted.attention, observation.counts.attention) if pressed else wanted.attention


def waits_too_long(observation: Observation) -> bool:
    """Whether requests wait for admission for a good part of what they may take to their first token."""
    return (observation.queue_wait_s or 0.0) * 1000 > WAIT_SHARE * observation.goals.ttft_ms


def _reason_to_pause(observation: Observation, now: float, pace: Pace) -> str | None:
    resize, last, override = observation.resize, observation.last_resize, observation.override
    if resize is not None and _overdue(observation, now):
        return f"the resize to {resize.to} is overdue after {now - resize.since_s:.0f} s: given up"
    if resize is not None:
        return f"a resize to {resize.to} is under way"
    if override is not None:
        return f"set to {override.counts} by hand, for {max(0.0, override.until_s - now):.0f} s more"
    if last is not None and not last.committed and now - last.at_s < pace.retry_s:
        return f"the resize to {last.to} was rolled back {now - last.at_s:.0f} s ago"
    return None


def _overdue(observation: Observation, now: float) -> bool:
    resize = observation.resize
    return resize is not None and now - resize.since_s > observation.goals.resize_deadline_s


def _since_change(observation: Observation, now: float) -> float:
    return now - observation.last_resize.at_s if observation.last_resize else float("inf")


def _grow(more: Counts, why: str, observation: Observation, memory: dict[str, Any], now: float, pace: Pace) -> Decision:
    if memory.get("futile", 0) >= MOST_FUTILE and not waits_too_long(observation):
        return hold(observation, f"{why}; the target is out of reach: more ranks did not help", memory)
    since = memory.setdefault("more_since", now)
    if now - since < pace.grow_after_s:
        return hold(observation, f"{why}; in {pace.grow_after_s - (now - since):.0f} s", memory)
    if _since_change(observation, now) < pace.grow_cooldown_s:
        return hold(observation, f"{why}; the last resize was just now", memory)
    del memory["more_since"]
    _regret(observation, memory, now, pace)
    if observation.tpot_ms is not None and observation.tpot_ms.p95 > observation.goals.tpot_ms:
        memory["growth"] = {
            "tpot_ms": observation.tpot_ms.p95,
            "requests": observation.requests,
            "ranks": sum(observation.counts),
            "at": now,
        }
    return Decision(more, why, memory)


def _most_wanted(wanted: Counts, memory: dict[str, Any], now: float, span_s: float) -> Counts | None:
    """Of each role in the last `span_s`, the present included; None where that is not known yet."""
    since = memory.setdefault("since", now)
    # What no more was wanted of than now cannot be the most.
    past = [[at, *counts] for at, *counts in memory.get("wanted", []) if at >= now - span_s and any(map(gt, counts, wanted))]
    memory["wanted"] = [*past, [now, *wanted]]
    _, attention, ffn = zip(*memory["wanted"], strict=True)
    return Counts(max(attention), max(ffn)) if now - since >= span_s else None


def _shrink(
    peak: Counts | None, why: str, observation: Observation, memory: dict[str, Any], now: float, pace: Pace, holds: Holds
) -> Decision:
    current = observation.counts
    if peak is None or (peak.attention >= current.attention and peak.ffn >= current.ffn):
        return hold(observation, f"{why}; but not for the last {pace.shrink_after_s:.0f} s", memory)
    if _since_change(observation, now) < pace.shrink_cooldown_s:
        return hold(observation, f"{why}; the last resize was just now", memory)
    lowest = _lowest(observation, memory, now, pace)
    floor = Counts(max(peak.attention, lowest.attention), max(peak.ffn, lowest.ffn))
    target = consolidated(current, floor, observation.goals.ffn_step, holds)
    if target == current:
        return hold(observation, f"{why}; but fewer ranks would not hold the target", memory)
    memory["shrunk"] = {"from": current, "load": _load(observation), "at": now}
    return Decision(target, why, memory)


def _load(observation: Observation) -> float:
    return observation.prompt_tokens_s + observation.output_tokens_s


def _regret(observation: Observation, memory: dict[str, Any], now: float, pace: Pace) -> None:
    """Growing: a reduction just before was a mistake, unless the load has grown since."""
    shrunk = memory.pop("shrunk", None)
    if shrunk is not None and now - shrunk["at"] < pace.regret_s and _load(observation) <= GROWN_LOAD * shrunk["load"]:
        memory["floor"] = {**shrunk, "until": now + 4 * pace.regret_s}


def _lowest(observation: Observation, memory: State, now: float, pace: Pace) -> Counts:
    """What one reduction may go down to."""
    current, floor = observation.counts, memory.get("floor")
    if not observation.requests and not _load(observation):
        return Counts(1, 1)
    step = Counts(*(math.ceil(count * (1 - pace.most_shrink)) for count in current))
    if floor is None or now > floor["until"] or _load(observation) < SAME_LOAD * floor["load"]:
        return step
    return Counts(*(max(pair) for pair in zip(step, floor["from"], strict=True)))


def consolidated(current: Counts, wanted: Counts, ffn_step: int, holds: Holds) -> Counts:
    """The fewest ranks from `current` down to `wanted` that still hold, one role's ranks after the other's."""
    reached = current
    while reached.attention > wanted.attention and holds(reached._replace(attention=reached.attention - 1)):
        reached = reached._replace(attention=reached.attention - 1)
    while reached.ffn - ffn_step >= wanted.ffn and holds(reached._replace(ffn=reached.ffn - ffn_step)):
        reached = reached._replace(ffn=reached.ffn - ffn_step)
    return reached


def _note_growth_in_vain(memory: dict[str, Any], observation: Observation, now: float, pace: Pace) -> None:
    """Counts growths that did not help; forgets them in time, and when the load is another one or the target is held."""
    growth, tpot = memory.get("growth"), observation.tpot_ms
    if growth is None:
        return
    requests, before = observation.requests, growth["requests"]
    if now - growth["at"] > pace.futile_s or not 0.5 <= (requests + 1) / (before + 1) <= 1.5:
        memory.pop("futile", None)
        memory.pop("growth")
        return
    grown = observation.last_resize is not None and observation.last_resize.at_s > growth["at"]
    if not grown or tpot is None or growth.get("judged") or _since_change(observation, now) < JUDGED_AFTER_S:
        return
    if requests > before * GROWN_LOAD:
        memory.pop("growth")
        return
    growth = memory["growth"] = {**growth, "judged": True}
    target_ms = observation.goals.tpot_ms
    if tpot.p95 > target_ms and tpot.p95 >= growth["tpot_ms"] * (1 - FUTILE_GAIN):
        memory["futile"] = memory.get("futile", 0) + 1
    else:
        memory["futile"] = MOST_FUTILE if _best_ms(growth, observation, tpot.p95) > target_ms else 0


def _best_ms(growth: State, observation: Observation, tpot_ms: float) -> float:
    """TPOT with all the ranks that are allowed, if each further growth helps as this one did; zero where that cannot be told."""
    before, ranks = growth["ranks"], sum(observation.counts)
    if ranks <= before:
        return 0.0
    exponent = math.log(growth["tpot_ms"] / tpot_ms) / math.log(ranks / before)
    return float(tpot_ms * (ranks / max(ranks, sum(observation.goals.most))) ** exponent)
