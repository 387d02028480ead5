"""The cluster's status, in the form that command line and HTTP show."""

from typing import Any

from actors.bringup import Bringup
from actors.roster import Hand, ask, placement_groups
from afd_ray.config import Config
from afd_ray.telemetry import mean_us, quantiles_ms

STAGES = ("attention", "ffn", "a2f", "f2a", "attention_wait", "ffn_wait")


async def cluster_status(config: Config, state: str, bringup: Bringup) -> dict[str, Any]:
    """As design promises it; actors that do not answer are shown as they were last known."""
    attention = [await _answer(hand) for hand in bringup.attention]
    ffn = [await _answer(hand) for hand in bringup.ffn]
    totals = [_pairs(answer["totals"]) for answer in (*attention, *ffn) if answer]
    return {
        "state": state,
        "epoch": bringup.epoch_number,
        "model": config.model.served_name,
        "attention": [_attention_row(h, a) for h, a in zip(bringup.attention, attention, strict=True)],
        "ffn": [_ffn_row(bringup, h, a) for h, a in zip(bringup.ffn, ffn, strict=True)],
        "placement_groups": placement_groups(bringup.hands),
        "tpot_ms": quantiles_ms(v for a in attention if a for v in a["tpot_ms"]),
        "ttft_ms": quantiles_ms(v for a in attention if a for v in a["ttft_ms"]),
        "stages_us": {stage: mean_us(totals, stage) for stage in STAGES},
        "micro_batches": bringup.epoch.micro_batches if bringup.epoch else None,
        "expert_loads": [sum(counts) for counts in zip(*(a["expert_loads"] for a in attention if a), strict=True)],
        "last_resize": None,
    }


async def _answer(hand: Hand) -> dict[str, Any] | None:
    if hand.state != "running":
        return None
    try:
        (answer,) = await ask([hand], "status", timeout_s=5)
    except (RuntimeError, TimeoutError):
        return None
    return dict(answer)


def _pairs(totals: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {stage: (int(pair[0]), int(pair[1])) for stage, pair in totals.items()}


def _common(hand: Hand, answer: dict[str, Any] | None) -> dict[str, Any]:
    identity = hand.identity
    return {
        "id": hand.name,
        "rank": answer["rank"] if answer else None,
        "node": identity.get("node"),
        "address": identity.get("address"),
        "pid": identity.get("pid"),
        "placement_group": hand.reservation.id,
        "state": hand.state,
        "reason": hand.reason,
        "pace": answer["pace"] if answer else None,
    }


def _attention_row(hand: Hand, answer: dict[str, Any] | None) -> dict[str, Any]:
    counts = {key: answer[key] if answer else None for key in ("running", "waiting", "kv_used", "kv_total", "micro_batches")}
    return _common(hand, answer) | counts


def _ffn_row(bringup: Bringup, hand: Hand, answer: dict[str, Any] | None) -> dict[str, Any]:
    row = _common(hand, answer)
    if bringup.epoch is not None and row["rank"] is not None:
        row["instance"], row["tp_rank"] = bringup.epoch.instance_of(row["rank"])
        row["rank"] -= bringup.epoch.attention
    return row | {"experts": answer["experts"] if answer else []}
