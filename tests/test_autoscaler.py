"""The autoscaler's shell with actors that answer as a test wants: what it does with a decision, and what it leaves alone."""

import pytest

from afd_ray.membership.shape import Shape
from tests.autoscaler_fake import LARGE, SMALL, FakeShelf, Setting, mine


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
        await setting.until(lambda: "committed" in setting.actions())
        assert (setting.shape, setting.actions()) == (LARGE, ["resize", "committed"])


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
    calls = shelf.read()["autoscaling"]["state"]["calls"]
    async with Setting(mine("by_requests"), shelf) as successor:
        await successor.until(lambda: bool(successor.autoscaler.decisions(last)))
        assert [entry["number"] for entry in successor.autoscaler.decisions()][: last + 1] == list(range(1, last + 2))
        assert successor.autoscaler.describe()["override"]["counts"] == {"attention": 2, "ffn": 2}
        assert successor.autoscaler._guard.state["calls"] > calls
