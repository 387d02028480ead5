from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.roster import Hand
from actors.status import cluster_status
from actors.transition import Transition
from afd_ray.config import Config
from afd_ray.measured import Measured

ANSWER = {
    **{
        "measured": Measured(0.0, 1.0).dump(),
        "recent": Measured(0.0, 1.0).dump(),
        "expert_loads": [],
        "moved_in": {},
        "pace": None,
    },
    **{"running": 0, "waiting": 0, "kv_used": 0, "kv_total": 1, "micro_batches": 1},
}


class Crew:
    def __init__(self, names: list[str], leaving: str) -> None:
        self.hands = {name: self._hand(name) for name in names}
        self._leaving = leaving

    def __contains__(self, name: object) -> bool:
        return name in self.hands

    def _hand(self, name: str) -> Hand:
        async def status() -> dict[str, Any]:
            self.hands.pop(self._leaving, None)  # released while the others are asked
            return ANSWER

        handle = SimpleNamespace(status=SimpleNamespace(remote=status))
        return Hand(name, "attention", handle, cast(Any, SimpleNamespace(id="g")), identity={"pid": 1})


async def test_an_actor_that_left_while_the_status_was_asked_for_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.status.placement_groups", lambda hands: [])
    crew = Crew(["attention-0", "attention-1"], leaving="attention-1")
    transition = SimpleNamespace(
        coordinator=SimpleNamespace(state="resizing", broken=""),
        crew=crew,
        roster=None,
        departed=[],
        last_resize=None,
        waiting_for="nodes: none is there",
        state_of=lambda hand: "running" if hand.name in crew else "dead",
    )
    status = await cluster_status(Config(), cast(Transition, transition))
    assert [(actor["id"], actor["state"]) for actor in status["attention"]] == [("attention-0", "running")]
    assert status["waiting_for"] == "nodes: none is there"
