"""From an undisturbed cluster through a storm to the account of what it left."""

import asyncio
import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.chaos.clients import Answer, Clients, Mishap, asks, undisturbed
from benchmarks.chaos.processes import Held, held, leaks
from benchmarks.chaos.schedule import Fault, Shape
from benchmarks.chaos.storm import NotWhole, Storm, Struck
from benchmarks.chaos.watch import asked

SETTLED_WITHIN_S = 20.0
LOOK_S = 0.2
CALM_S = 2.0
"""Of load before the first fault: what gaps there are anyway."""


class Plan(NamedTuple):
    """What is done to whom."""

    model: str
    """As clients call it."""
    vocabulary: int
    shape: Shape
    faults: Sequence[Fault]
    seed: int = 0
    clients: int = 32
    max_tokens: int = 100
    patience_s: float = 120.0


class Result(NamedTuple):
    struck: list[Struck]
    kills: int
    calm_gaps_s: list[float]
    """Between tokens, while nothing happened."""
    mishaps: list[Mishap]
    """All there were."""
    unexcused: list[Mishap]
    """Without those that a death of Serve's own actors explains."""
    answered: int
    tokens: int
    left: list[str]
    """What is left of it that was not there before, a line each."""
    end: str | None
    """Why the storm ended early."""

    @property
    def good(self) -> bool:
        return not (self.unexcused or self.left or self.end)


async def run(url: str, plan: Plan) -> Result:
    """On a cluster at rest, in the Ray cluster that this process is connected to; it has the plan's shape before and after."""
    wanted = asks(plan.seed, plan.clients, plan.vocabulary, plan.max_tokens)
    expected = await undisturbed(url, plan.model, wanted)
    before = await at_rest()
    clients = Clients(url, plan.model, wanted, expected, hung_after_s=plan.patience_s)
    clients.start()
    await asyncio.sleep(CALM_S)
    calm = gaps(clients.since(0.0))
    storm = Storm(url, clients, plan.shape, plan.patience_s)
    end = None
    try:
        await storm.rage(plan.faults)
    except NotWhole as error:
        end = str(error)
        print(f"the storm ended early: {end}", file=sys.stderr)
    await clients.stop()
    left = [] if end else await whats_left(before)
    return Result(
        storm.struck,
        storm.kills,
        calm,
        clients.mishaps,
        unexcused(clients.mishaps, storm.struck),
        clients.answered,
        clients.tokens,
        left,
        end,
    )


def gaps(answers: Sequence[Answer]) -> list[float]:
    return [after - before for answer in answers for before, after in itertools.pairwise(answer.times_s[1:])]


def unexcused(mishaps: Sequence[Mishap], struck: Sequence[Struck]) -> list[Mishap]:
    """All but those where a client was told to ask again because of a fault of Serve's own actors."""
    excused = {mishap for one in struck if one.excused for mishap in one.mishaps if mishap.kind == "retryable"}
    return [mishap for mishap in mishaps if mishap not in excused]


async def at_rest() -> Held:
    """What the cluster holds, once nothing is in progress."""
    while await busy():
        await asyncio.sleep(LOOK_S)
    return await asyncio.to_thread(held)


async def busy() -> list[str]:
    """Requests and KV blocks, a line for each attention actor that has any."""
    status = await asked("status")
    names = ("running", "waiting", "kv_used")
    return [
        f"{row['id']}: {[row[name] for name in names]} {names}"
        for row in status["attention"]
        if row["state"] != "dead" and any(row[name] for name in names)
    ]


async def whats_left(before: Held) -> list[str]:
    """Beyond what there was before, after some time in which it may go."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + SETTLED_WITHIN_S
    while True:
        lines = [*await busy(), *await asked("check_integrity"), *leaks(before, await asyncio.to_thread(held))]
        if not lines or loop.time() > deadline_s:
            return lines
        await asyncio.sleep(LOOK_S)
