"""What all actors of an epoch measured, looked at together."""

import asyncio
from collections.abc import Sequence

from actors.roster import Hand
from actors.status import answer_of
from afd_ray.autoscaling.observing import Look
from afd_ray.measured import Measured, MeasuredFFN


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
