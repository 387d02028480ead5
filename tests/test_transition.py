"""The shell around the coordinator, with actors that answer as a test wants: what becomes of a resize, and of what its actors hold."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
import pytest_asyncio
from ray.exceptions import RayActorError

from actors.crew import Crew
from actors.transition import Transition
from afd_ray.config import parse_config
from afd_ray.handoff.message import LinkError
from afd_ray.membership.events import Lost, Phase, Record
from afd_ray.membership.shape import Shape
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import FFNShard
from tests.crew_fake import FakeCrew

TIMEOUT_S = 10.0
SMALL, LARGE = Shape(1, 1, 1, None), Shape(2, 1, 2, None)


class Setting:
    """A cluster that has formed."""

    def __init__(self, redundant: int = 0) -> None:
        self.crew = FakeCrew()
        self.records: list[Record] = []
        config = parse_config({"ffn": {"redundant_experts": redundant}, "failure": {"detect_timeout_s": 60.0}})
        self.transition = Transition(config, PRESETS["step3-tiny"], cast(Crew, self.crew), self.records.append)

    async def form(self, shape: Shape) -> None:
        assert (await self.transition.ask(shape))["outcome"] == "committed"

    async def until(self, wanted: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not wanted():
                await asyncio.sleep(0)

    async def until_phase(self, phase: Phase) -> None:
        coordinator = self.transition.coordinator
        await self.until(lambda: coordinator.change is not None and coordinator.change.phase == phase)

    def shards(self, member: str) -> list[FFNShard]:
        return [args[0] for op, args in self.crew[member].handle.calls if op == "load"]


@pytest_asyncio.fixture
async def setting() -> AsyncIterator[Setting]:
    made = Setting()
    await made.form(SMALL)
    yield made
    made.transition.close()


async def test_a_refused_resize_does_not_take_the_pause_of_the_one_in_progress(setting: Setting) -> None:
    transition = setting.transition
    retired = setting.crew.hold("retire")
    first = asyncio.ensure_future(transition.ask(LARGE))
    await setting.until_phase("retire")
    second = await transition.ask(Shape(3, 1, 1, None))
    assert (second["outcome"], second["pause_ms"]) == ("refused", None)
    retired.set()
    answer = await first
    assert (answer["outcome"], answer["pause_ms"]) == ("committed", 7.0)
    assert transition.last_resize == answer


async def test_epochs_that_are_over_are_forgotten(setting: Setting) -> None:
    transition, connected = setting.transition, setting.crew.hold("connect")
    growing = asyncio.ensure_future(transition.ask(LARGE))
    await setting.until_phase("connect")
    assert set(transition.epochs.decided) == {1, 2}
    connected.set()
    await growing
    for shape in (SMALL, LARGE, SMALL):
        await setting.form(shape)
    assert set(transition.epochs.decided) == {5}


DEATH = RayActorError(error_msg="killed by a signal")
FAILURES: list[tuple[str, str, Exception, str]] = [
    ("load", "ffn-3", MemoryError("cannot allocate 7 bytes"), "ffn-3: load failed: cannot allocate 7 bytes"),
    ("load", "attention-2", DEATH, "attention-2 is lost: killed by a signal"),
    ("prepare", "attention-2", DEATH, "attention-2 is lost: killed by a signal"),
    ("prepare", "ffn-1", OSError("no space left"), "ffn-1: prepare failed: no space left"),
    ("connect", "attention-0", LinkError(2, "no answer"), "attention-0: connect failed: edge to rank 2: no answer"),
    ("drain", "attention-0", RuntimeError("stuck"), "attention-0: drain failed: stuck"),
]


@pytest.mark.parametrize(("op", "member", "error", "reason"), FAILURES)
async def test_a_resize_that_fails_says_why_and_the_next_one_works(
    setting: Setting, op: str, member: str, error: Exception, reason: str
) -> None:
    transition, crew = setting.transition, setting.crew
    crew.errors[op, member] = error
    answer = await transition.ask(LARGE)
    assert answer["outcome"] == "rolled_back"
    assert reason in answer["reason"]
    await check_serves_on(setting, answer)


async def test_a_link_that_breaks_in_the_barrier_rolls_back(setting: Setting) -> None:
    transition, crew = setting.transition, setting.crew
    crew.hold("drain")
    growing = asyncio.ensure_future(transition.ask(LARGE))
    await setting.until_phase("drain")
    crew["ffn-3"].handle.ended.set_result("edge to rank 0: closed by the peer")
    answer = await growing
    assert (answer["outcome"], answer["reason"]) == ("rolled_back", "ffn-3: edge to rank 0: closed by the peer")
    await check_serves_on(setting, answer)


@pytest.mark.parametrize("phase", ["provide", "load", "prepare", "connect", "drain"])
async def test_a_resize_that_is_not_over_in_time_is_rolled_back_wherever_it_is(setting: Setting, phase: Phase) -> None:
    transition = setting.transition
    setting.crew.hold(phase)
    growing = asyncio.ensure_future(transition.ask(LARGE, timeout_s=0.05))
    await setting.until_phase(phase)
    answer = await growing
    assert (answer["outcome"], answer["reason"]) == ("rolled_back", "not over in 0.05 s")
    await check_serves_on(setting, answer)


async def test_a_resize_that_waits_for_nodes_when_its_time_is_over_says_for_which(setting: Setting) -> None:
    transition, crew = setting.transition, setting.crew
    crew.hold("provide")
    growing = asyncio.ensure_future(transition.ask(LARGE, timeout_s=0.05))
    await setting.until_phase("provide")
    crew.lack = "needed: 98 CPUs; free: 5 CPUs"
    assert transition.waiting_for == "nodes: needed: 98 CPUs; free: 5 CPUs"
    answer = await growing
    assert answer["reason"] == "not over in 0.05 s; waiting for nodes: needed: 98 CPUs; free: 5 CPUs"
    crew.lack = None
    await check_serves_on(setting, answer)


async def test_an_operator_can_call_a_resize_off(setting: Setting) -> None:
    transition = setting.transition
    with pytest.raises(RuntimeError, match="no resize is in progress"):
        await transition.call_off("in a hurry")
    setting.crew.hold("provide")
    growing = asyncio.ensure_future(transition.ask(LARGE))
    await setting.until_phase("provide")
    called_off = await transition.call_off("in a hurry")
    assert (called_off["outcome"], called_off["reason"]) == ("rolled_back", "in a hurry")
    assert await growing == called_off
    await check_serves_on(setting, called_off)


async def test_what_has_committed_is_not_called_off(setting: Setting) -> None:
    retired = setting.crew.hold("retire")
    growing = asyncio.ensure_future(setting.transition.ask(LARGE))
    await setting.until_phase("retire")
    calling_off = asyncio.ensure_future(setting.transition.call_off("in a hurry"))
    await asyncio.sleep(0)
    retired.set()
    assert (await calling_off)["outcome"] == "committed"
    assert (await growing)["outcome"] == "committed"


async def check_serves_on(setting: Setting, answer: dict[str, Any]) -> None:
    transition, crew = setting.transition, setting.crew
    assert transition.last_resize == answer
    assert (transition.coordinator.state, transition.roster and transition.roster.number) == ("ready", 1)
    assert set(crew.hands) == {"attention-0", "ffn-1"}
    crew.held, crew.errors = {}, {}
    again = await transition.ask(LARGE)
    assert (again["outcome"], again["reason"]) == ("committed", None)
    assert len(crew.hands) == 4


async def test_who_is_left_after_a_loss_loads_only_what_nobody_has() -> None:
    setting = Setting(redundant=2)
    transition, crew = setting.transition, setting.crew
    await setting.form(Shape(1, 1, 2, None))
    before = [transition.epoch(transition.roster).experts[instance] for instance in (0, 1) if transition.roster]
    crew.hold("provide")
    transition.tell(Lost("ffn-2", "killed"))
    await setting.until_phase("provide")
    assert setting.shards("ffn-1")[-1].experts == tuple(range(8))
    setting.crew.held["provide"].set()
    await setting.until(lambda: transition.coordinator.state == "ready")
    assert [setting.shards(member)[-1].experts for member in ("ffn-1", "ffn-3")] == before
    transition.close()
