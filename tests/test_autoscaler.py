"""The autoscaler's shell with actors that answer as a test wants: what it does with a decision, and what it leaves alone."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

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
    """A cluster of 1A1F that has formed, with an autoscaler that looks as often as it can."""

    def __init__(self, policy: str, shelf: FakeShelf | None = None, **scaling: Any) -> None:
        self.shelf = shelf or FakeShelf()
        self.crew = FakeCrew()
        self.crew.status = lambda member: status(member.partition("-")[0], time.monotonic(), running=1)
        options = {"policy": policy, "period_s": 0.001, "max": {"attention": 9, "ffn": 9}} | scaling
        config = parse_config({"autoscaling": options, "failure": {"detect_timeout_s": 60.0}})
        self.transition = Transition(config, MODEL, cast(Crew, self.crew), lambda record: None)
        self.autoscaler = Autoscaler(config, MODEL.num_hidden_layers, self.transition, self.shelf)

    async def __aenter__(self) -> "Setting":
        assert (await self.transition.ask(SMALL))["outcome"] == "committed"
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
                await asyncio.sleep(0)

    async def more(self, decisions: int) -> None:
        """Until so many more have been made."""
        enough = self.autoscaler.decisions()[-1]["number"] + decisions if self.autoscaler.decisions() else decisions
        await self.until(lambda: bool(self.autoscaler.decisions(enough - 1)))

    def scale(self, shape: Shape) -> "asyncio.Task[dict[str, Any]]":
        """As an operator."""
        return asyncio.create_task(self.autoscaler.by_hand(shape, lambda: self.transition.ask(shape)))


def mine(name: str) -> str:
    return f"tests.scaling_policies:{name}"


async def test_a_decision_is_acted_on_and_recorded_with_its_reason_and_its_end() -> None:
    async with Setting(mine("larger")) as setting:
        await setting.until(lambda: "committed" in setting.actions())
        assert (setting.shape, setting.actions()) == (LARGE, ["resize", "committed"])
        resize = next(entry for entry in setting.autoscaler.decisions() if entry["action"] == "resize")
        assert (resize["before"], resize["wanted"]) == ({"attention": 1, "ffn": 1}, {"attention": 2, "ffn": 2})
        assert (resize["reason"], resize["seen"]["requests"]) == ("larger", 1)


async def test_it_looks_on_while_a_resize_is_under_way_and_begins_no_other() -> None:
    async with Setting(mine("larger")) as setting:
        connected = setting.crew.hold("connect")
        await setting.until(lambda: setting.actions() == ["resize"])
        await setting.more(3)
        assert setting.actions() == ["resize"]
        connected.set()
        await setting.until(lambda: setting.actions() == ["resize", "committed"])


async def test_a_policy_can_give_its_resize_up() -> None:
    async with Setting(mine("larger_or_not")) as setting:
        setting.crew.hold("connect")
        await setting.until(lambda: "rolled_back" in setting.actions())
        assert (setting.shape, setting.actions()[:3]) == (SMALL, ["resize", "give_up", "rolled_back"])


async def test_a_resize_that_is_overdue_is_given_up() -> None:
    async with Setting(mine("larger"), resize_deadline_s=0.05) as setting:
        setting.crew.hold("connect")
        await setting.until(lambda: "rolled_back" in setting.actions())
        assert "not over in 0.05 s" in setting.reasons()


async def test_a_shape_that_cannot_be_is_refused_and_the_policy_is_told() -> None:
    async with Setting(mine("too_large")) as setting:
        await setting.until(lambda: "refused" in setting.actions())
        await setting.more(2)
        assert (setting.shape, setting.actions()) == (SMALL, ["resize", "refused"])
        assert any("experts" in reason for reason in setting.reasons())


async def test_an_operator_goes_before_the_policy_and_is_left_alone() -> None:
    async with Setting(mine("larger")) as setting:
        connected = setting.crew.hold("connect")
        await setting.until(lambda: setting.actions() == ["resize"])
        scaling = setting.scale(Shape(3, 1, 1, None))
        await setting.until(lambda: "rolled_back" in setting.actions())
        connected.set()
        assert (await scaling)["outcome"] == "committed"
        await setting.more(3)
        assert setting.shape == Shape(3, 1, 1, None)
        assert setting.actions() == ["resize", "by_hand", "rolled_back", "committed"]
        assert setting.reasons()[-1] == "set to 3A1F by hand; the policy wants 2A2F"


async def test_what_an_operator_set_is_the_policy_s_again_in_time() -> None:
    async with Setting(mine("larger"), override_s=0.0) as setting:
        assert (await setting.scale(Shape(3, 1, 1, None)))["outcome"] in ("committed", "refused")
        await setting.until(lambda: setting.shape == LARGE)


async def test_counts_that_an_operator_did_not_get_bind_nobody() -> None:
    async with Setting(mine("by_requests")) as setting:
        setting.crew.errors["prepare", setting.members[0]] = RuntimeError("no room")
        assert (await setting.scale(LARGE))["outcome"] == "rolled_back"
        assert setting.autoscaler.describe()["override"] is None


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("raises", "the policy raised ZeroDivisionError: planted"),
        ("nonsense", "the policy gave {'attention': 'many'}, not a Decision"),
    ],
)
async def test_an_unsound_policy_changes_nothing_and_is_told_on(policy: str, said: str) -> None:
    async with Setting(mine(policy)) as setting:
        await setting.more(3)
        assert (setting.shape, set(setting.reasons())) == (SMALL, {said})


async def test_a_policy_that_sleeps_holds_nobody_up() -> None:
    async with Setting(mine("sleeps")) as setting:
        await setting.until(lambda: setting.autoscaler._looking is not None)
        assert (await setting.scale(LARGE))["outcome"] == "committed"
        await setting.until(lambda: "the policy is still busy with an earlier question" in setting.reasons())


async def test_nothing_is_decided_without_all_attention_actors() -> None:
    async with Setting(mine("larger")) as setting:
        setting.crew.errors["status", setting.members[0]] = RuntimeError("busy")
        await setting.more(2)
        assert setting.shape == SMALL
        assert set(setting.reasons()) == {"nothing decided: no answer from attention-0"}


async def test_an_ffn_actor_that_does_not_answer_is_done_without() -> None:
    async with Setting(mine("larger")) as setting:
        setting.crew.errors["status", setting.members[1]] = RuntimeError("busy")
        await setting.until(lambda: setting.shape == LARGE)


async def test_nobody_is_looked_at_for_the_fixed_policy() -> None:
    async with Setting("fixed") as setting:
        assert (await setting.scale(LARGE))["outcome"] == "committed"
        calls = [op for hand in setting.crew.hands.values() for op, _ in hand.handle.calls]
        assert "status" not in calls
        assert setting.actions() == ["by_hand", "committed"]


async def test_a_successor_goes_on_with_numbers_state_and_override() -> None:
    shelf = FakeShelf()
    async with Setting(mine("by_requests"), shelf) as setting:
        await setting.more(3)
        await setting.scale(LARGE)
        last = setting.autoscaler.decisions()[-1]["number"]
        calls = setting.autoscaler._guard.state["calls"]
    async with Setting(mine("by_requests"), shelf) as successor:
        await successor.until(lambda: bool(successor.autoscaler.decisions(last)))
        assert [entry["number"] for entry in successor.autoscaler.decisions()][: last + 1] == list(range(1, last + 2))
        assert successor.autoscaler.describe()["override"]["counts"] == {"attention": 2, "ffn": 2}
        assert successor.autoscaler._guard.state["calls"] > calls
