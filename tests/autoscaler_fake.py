"""An autoscaler over actors and a shelf that are none, for tests."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, cast

from actors.autoscaler import Autoscaler
from actors.crew import Crew
from actors.transition import Transition
from afd_ray.config import parse_config
from afd_ray.membership.shape import Shape
from afd_ray.models.presets import PRESETS
from tests.crew_fake import FakeCrew
from tests.measured_scenes import status

TIMEOUT_S = 10.0
SMALL, LARGE = Shape(1, 1, 1, None), Shape(2, 1, 2, None)
MODEL = PRESETS["step3-tiny"]  # 8 experts


class FakeShelf:
    """As `ledger.Shelf`: what is on it goes through JSON."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def put(self, key: str, value: Any) -> None:
        self.values[key] = json.dumps(value)

    def drop(self, key: str) -> None:
        self.values.pop(key, None)

    def read(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self.values.items()}


class Setting:
    """A cluster that has formed, with an autoscaler that looks as often as it can."""

    def __init__(
        self,
        policy: str,
        shelf: FakeShelf | None = None,
        shape: Shape = SMALL,
        measured: Callable[[str], dict[str, Any]] = lambda member: {"running": 1},
        clock: Callable[[], float] = time.monotonic,
        **scaling: Any,
    ) -> None:
        """`measured`: by this attention actor, as `Measured` names it. `clock`: what the policy goes by."""
        self._first = shape
        self.shelf = shelf or FakeShelf()
        self.crew = FakeCrew()
        self.crew.status = lambda member: status(member.partition("-")[0], time.monotonic(), **measured(member))
        options = {"policy": policy, "period_s": 0.001, "max": {"attention": 9, "ffn": 9}} | scaling
        config = parse_config({"autoscaling": options, "failure": {"detect_timeout_s": 60.0}})
        self.transition = Transition(config, MODEL, cast(Crew, self.crew), lambda record: None)
        self.autoscaler = Autoscaler(config, MODEL.num_hidden_layers, self.transition, self.shelf, clock)

    async def __aenter__(self) -> "Setting":
        assert (await self.transition.ask(self._first))["outcome"] == "committed"
        self.autoscaler.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.autoscaler.close()
        self.transition.close()

    @property
    def shape(self) -> Shape | None:
        return self.transition.roster.shape if self.transition.roster else None

    @property
    def members(self) -> tuple[str, ...]:
        assert self.transition.roster
        return self.transition.roster.members

    def actions(self) -> list[str]:
        """All but to hold."""
        return [entry["action"] for entry in self.autoscaler.decisions() if entry["action"] != "hold"]

    def reasons(self) -> list[str]:
        return [entry["reason"] for entry in self.autoscaler.decisions()]

    async def until(self, wanted: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not wanted():
                await asyncio.sleep(0.001)  # not without a pause: the policy runs on a thread of its own

    async def more(self, decisions: int) -> None:
        """Until so many more have been made."""
        enough = self.autoscaler.decisions()[-1]["number"] + decisions if self.autoscaler.decisions() else decisions
        await self.until(lambda: bool(self.autoscaler.decisions(enough - 1)))

    def scale(self, shape: Shape) -> "asyncio.Task[dict[str, Any]]":
        """As an operator."""
        return asyncio.create_task(self.autoscaler.by_hand(shape, lambda: self.transition.ask(shape)))


def mine(name: str) -> str:
    return f"tests.scaling_policies:{name}"
