"""The cluster's status, in the form that command line and HTTP show."""

import asyncio
from typing import Any

from actors.roster import Hand, ask, placement_groups
from actors.transition import Transition
from afd_ray.config import Config
from afd_ray.figures import of_stages, served, stages_us
from afd_ray.measured import STAGES, Measured, MeasuredFFN, load_stages
from afd_ray.membership.events import Roster
from afd_ray.metrics import Sample, attention_samples, cluster_samples, ffn_samples
from placement.planner import Role

ANSWER_TIMEOUT_S = 2.0
"""Who takes longer is shown as last known: a status must not wait for the lost."""

Answer = dict[str, Any]
Shown = list[tuple[Hand, Answer | None]]
"""Every actor in order of rank, then those that departed; None: it did not answer."""


async def cluster_status(config: Config, transition: Transition) -> dict[str, Any]:
    """As design promises it; actors that do not answer are shown as they were last known."""
    return _describe(config, transition, await _ask_all(transition))


async def cluster_metrics(config: Config, transition: Transition) -> list[Sample]:
    """Of the cluster, and of every actor that answers."""
    shown = await _ask_all(transition)
    samples = cluster_samples(_describe(config, transition, shown))
    for hand, answer in shown:
        if answer is not None:
            samples += actor_samples(hand.name, hand.role, answer)
    return samples


def actor_samples(name: str, role: Role, answer: Answer) -> list[Sample]:
    """By an actor's own status answer."""
    if role == "attention":
        return attention_samples(name, Measured.load(answer["measured"]), Measured.load(answer["recent"]))
    return ffn_samples(name, MeasuredFFN.load(answer["measured"]), MeasuredFFN.load(answer["recent"]))


async def _ask_all(transition: Transition) -> Shown:
    crew = transition.crew
    hands = list(crew.hands.values())
    answered = await asyncio.gather(*map(answer_of, hands))
    answers = {hand.name: answer for hand, answer in zip(hands, answered, strict=True)}
    hands = [hand for hand in hands if hand.name in crew]  # who was released meanwhile is not dead; who was lost has departed
    living: Shown = [(hand, answers[hand.name]) for hand in _in_order(hands, transition.roster)]
    return living + [(hand, None) for hand in transition.departed]


def _describe(config: Config, transition: Transition, shown: Shown) -> dict[str, Any]:
    coordinator, roster = transition.coordinator, transition.roster
    epoch = transition.epoch(roster) if roster else None
    attention = [answer for hand, answer in shown if answer and hand.role == "attention"]
    stages = [load_stages(answer["recent"]["stages"]) for _, answer in shown if answer]
    goals = config.autoscaling
    return {
        "state": coordinator.state,
        "epoch": roster.number if roster else 0,
        "model": config.model.served_name,
        "attention": [_attention_row(transition, h, a) for h, a in shown if h.role == "attention"],
        "ffn": [_ffn_row(transition, h, a) for h, a in shown if h.role == "ffn"],
        "placement_groups": placement_groups([hand for hand, _ in shown if hand.name in transition.crew]),
        **served([Measured.load(answer["recent"]) for answer in attention]),
        "targets_ms": {"tpot": goals.tpot_target_ms, "ttft": goals.ttft_target_ms},
        "stages_us": stages_us(stages, STAGES),
        "micro_batches": epoch.micro_batches if epoch else None,
        "expert_loads": [sum(counts) for counts in zip(*(a["expert_loads"] for a in attention), strict=True)],
        "moved_in": _summed([answer["moved_in"] for answer in attention]),
        "reason": coordinator.broken or None,
        "waiting_for": transition.waiting_for,
        "last_resize": transition.last_resize,
    }


def _in_order(hands: list[Hand], roster: Roster | None) -> list[Hand]:
    """By rank, those without one behind."""
    ranks = {member: rank for rank, member in enumerate(roster.members if roster else ())}
    return sorted(hands, key=lambda hand: ranks.get(hand.name, len(ranks)))


async def answer_of(hand: Hand) -> dict[str, Any] | None:
    """An actor's part; None for one that is not up yet, or does not answer."""
    if not hand.identity:
        return None
    try:
        (answer,) = await ask([hand], "status", timeout_s=ANSWER_TIMEOUT_S)
    except (RuntimeError, TimeoutError):
        return None
    return dict(answer)


def _summed(counts: list[dict[str, float]]) -> dict[str, float]:
    """Over the attention actors that there are now."""
    return {name: sum(count[name] for count in counts) for name in (counts[0] if counts else ())}


def _common(transition: Transition, hand: Hand, answer: dict[str, Any] | None) -> dict[str, Any]:
    identity = hand.identity
    return {
        "id": hand.name,
        "rank": _rank(transition.roster, hand),
        "node": identity.get("node"),
        "address": identity.get("address"),
        "pid": identity.get("pid"),
        "placement_group": hand.reservation.id,
        "state": transition.state_of(hand),
        "reason": hand.reason,
        "pace": answer["pace"] if answer else None,
        **of_stages(load_stages(answer["recent"]["stages"]) if answer else {}),
    }


def _rank(roster: Roster | None, hand: Hand) -> int | None:
    """Among those of its role."""
    names = () if roster is None else roster.attention if hand.role == "attention" else roster.ffn
    return names.index(hand.name) if hand.name in names else None


def _attention_row(transition: Transition, hand: Hand, answer: dict[str, Any] | None) -> dict[str, Any]:
    counts = {key: answer[key] if answer else None for key in ("running", "waiting", "kv_used", "kv_total", "micro_batches")}
    recent = [Measured.load(answer["recent"])] if answer else []
    return _common(transition, hand, answer) | counts | served(recent)


def _ffn_row(transition: Transition, hand: Hand, answer: dict[str, Any] | None) -> dict[str, Any]:
    row = _common(transition, hand, answer)
    if row["rank"] is not None and transition.roster is not None:
        row["instance"], row["tp_rank"] = divmod(row["rank"], transition.roster.shape.tensor_parallel)
    return row | {"experts": answer["experts"] if answer else []}
