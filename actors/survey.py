"""What all actors of an epoch measured, looked at together."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from actors.place import wire_dtype
from actors.roster import Hand
from actors.status import answer_of
from actors.transition import Transition
from afd_ray.autoscaling.observing import Look
from afd_ray.config import Config
from afd_ray.handoff.rows import partial_row_bytes, row_bytes
from afd_ray.measured import Measured, MeasuredFFN
from afd_ray.models.config import ModelConfig
from afd_ray.simulation.serving.profiling import Facts


async def look_at(epoch: int, hands: Sequence[Hand]) -> tuple[Look, list[str]]:
    """At the members of this epoch; and which attention actors did not answer: without theirs, sums over all would be wrong."""
    answered = await asyncio.gather(*map(answer_of, hands))
    pairs = list(zip(hands, answered, strict=True))
    attention = {hand.name: answer for hand, answer in pairs if answer and hand.role == "attention"}
    look = Look(
        epoch=epoch,
        attention={name: Measured.load(answer["measured"]) for name, answer in attention.items()},
        ffn={hand.name: MeasuredFFN.load(answer["measured"]) for hand, answer in pairs if answer and hand.role == "ffn"},
        recent=[Measured.load(answer["recent"]) for answer in attention.values()],
        slots=max((answer["micro_batches"] for answer in attention.values()), default=1),
    )
    return look, [hand.name for hand, answer in pairs if hand.role == "attention" and not answer]


async def measured(config: Config, model: ModelConfig, transition: Transition) -> dict[str, Any]:
    """The attention actors' sums, and what bounds the loads that the cluster can be given (`profiling.Facts`), as JSON values.

    Raises RuntimeError while there is no epoch, and when one of them does not answer.
    """
    roster = transition.roster
    if roster is None:
        raise RuntimeError(f"the cluster is {transition.coordinator.state}: nothing serves")
    look, silent = await look_at(roster.number, transition.hands)
    if silent or not look.attention:
        raise RuntimeError(f"no answer from {', '.join(silent) or 'any attention actor'}")
    blocks = min(one.kv_total for one in look.attention.values())
    wire = wire_dtype(config, model)
    facts = Facts(
        attention=roster.shape.attention,
        ffn=roster.shape.ffn,
        layers=model.num_hidden_layers,
        token_budget=config.pipeline.max_tokens_per_micro_batch,
        max_running=config.pipeline.max_running_requests,
        context_limit=config.context_limit(model.max_position_embedding),
        kv_tokens=blocks * config.attention.kv_cache.block_size,
        vocab_size=model.vocab_size,
        bytes_per_row=row_bytes(model, wire) + partial_row_bytes(model, wire),
    )
    return {
        "epoch": roster.number,
        "facts": asdict(facts),
        "attention": {name: one.dump() for name, one in look.attention.items()},
    }
