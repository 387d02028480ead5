"""The cluster as its controller tells of it, asked again until there is one that answers."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from actors.controller import NAME, NAMESPACE

RETRY_S = 0.05
ANSWER_TIMEOUT_S = 20.0


async def asked(method: str, *args: Any, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Any:
    """The answer of whichever controller there is, as soon as one answers; what it raises itself is raised here."""
    while True:
        try:
            controller = ray.get_actor(NAME, namespace=NAMESPACE)
            async with asyncio.timeout(timeout_s):
                return await getattr(controller, method).remote(*args)
        except ray.exceptions.RayTaskError:
            raise
        except (ray.exceptions.RayError, ValueError, TimeoutError):
            await asyncio.sleep(RETRY_S)


class Seen(NamedTuple):
    """A state of the cluster and when it was heard of, `time.monotonic()`."""

    at_s: float
    epoch: int
    state: str


def repaired_s(before: Seen, after: Iterable[Seen]) -> float | None:
    """When a fault was recovered from: in an epoch later than the one that was broken, or back in that one.

    `after`: what was heard since the fault, `before`: what before it. None: it called for no recovery, whatever change was in progress.
    """
    broken = before.epoch if before.state == "recovering" else None
    rested = before.state == "ready"
    for seen in after:
        if broken is not None:
            if seen.epoch > broken or seen.state == "ready":
                return seen.at_s
        elif seen.state == "recovering":
            broken = seen.epoch
        elif seen.state == "resizing" and rested:
            return None  # asked for since
        rested = rested or seen.state == "ready"
    return None


@dataclass
class Watch:
    """Writes down every change of epoch or state until closed."""

    seen: list[Seen] = field(default_factory=list)
    _task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        view = await asked("ingress_view")
        self.seen.append(Seen(time.monotonic(), view["epoch"], view["state"]))
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def now(self) -> Seen:
        return self.seen[-1]

    def noticed(self, since_s: float) -> float | None:
        """Seconds from then to the first change."""
        return next((seen.at_s - since_s for seen in self.since(since_s)), None)

    def since(self, at_s: float) -> list[Seen]:
        return [seen for seen in self.seen if seen.at_s > at_s]

    async def _follow(self) -> None:
        while True:
            epoch, state = await asked("changed", self.now.epoch, self.now.state, timeout_s=None)
            if (epoch, state) != self.now[1:]:
                self.seen.append(Seen(time.monotonic(), epoch, state))
