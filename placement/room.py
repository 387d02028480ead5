"""Room for groups: on the nodes there are, or on those that still come."""

import asyncio
import time
from collections.abc import Callable, Sequence

from ray.autoscaler.sdk import request_resources

from placement.groups import inventory
from placement.planner import Group, Infeasible, Node, Placed

POLL_S = 1.0


def demand(groups: Sequence[Group]) -> None:
    """Tell Ray's autoscaler, where there is one, which nodes it should start; in place of what it was told before."""
    bundles = [{"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {}) for group in groups]
    request_resources(bundles=bundles, bundle_label_selectors=[dict(group.labels) for group in groups])


async def find_room(
    groups: Sequence[Group],
    place: Callable[[list[Node]], list[Placed]],
    wait_s: float,
    *,
    on_lack: Callable[[str], None] = lambda reason: None,
    look: Callable[[], list[Node]] = inventory,
    ask: Callable[[Sequence[Group]], None] = demand,
    clock: Callable[[], float] = time.monotonic,
) -> list[Placed]:
    """What `place` makes of the cluster's nodes. Where that is Infeasible, Ray's autoscaler is asked for nodes, and whatever joins within `wait_s` counts.

    `on_lack` is told what is missing whenever that is something else. Raises Infeasible.
    """
    end_s, told = clock() + wait_s, ""
    try:
        while True:
            try:
                return place(await asyncio.to_thread(look))
            except Infeasible as error:
                lack = str(error)
                if clock() >= end_s:
                    waited = f", and no node that would help came in {wait_s:g} s" if wait_s else ""
                    raise Infeasible(lack + waited) from None
            if lack != told:
                await asyncio.to_thread(ask, groups)
                on_lack(lack)
                told = lack
            await asyncio.sleep(min(POLL_S, wait_s))
    finally:
        if told:
            await asyncio.to_thread(ask, [])
