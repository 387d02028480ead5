"""The ingress serves on while the controller is dead or silent, and finds the next one; real token streams, no Ray."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from actors import cluster_view
from actors.http.backend import Unavailable
from actors.ingress import ClusterBackend
from afd_ray.request import Request, SamplingParams
from tests.attention_fake import TIMEOUT_S, FakeAttention, Relay, eventually, reply
from tests.controller_fake import FakeController
from tests.ingress_fake import write_tokenizer


class Setting:
    """An ingress that follows whichever controller there is."""

    def __init__(self, directory: Path) -> None:
        self.directory = write_tokenizer(directory)
        self.controllers: list[FakeController] = []
        self.backend = ClusterBackend(self._find, ingress_id="i", max_queued=4, patience_s=TIMEOUT_S)
        self.following = asyncio.create_task(self.backend.follow())

    def bring(self, actors: dict[str, FakeAttention], state: str = "ready") -> FakeController:
        self.controllers = [FakeController(self.directory, actors, state)]
        return self.controllers[0]

    def start(self, name: str) -> "asyncio.Task[list[int | None]]":
        async def read() -> list[int | None]:
            async with asyncio.timeout(TIMEOUT_S):
                return [output.token_id async for output in self.backend.generate(request(name))]

        return asyncio.create_task(read())

    def _find(self) -> Any:
        if not self.controllers:
            raise ValueError("no such actor")
        return self.controllers[0]


def request(name: str) -> Request:
    return Request(name, (1, 2), SamplingParams(max_tokens=8, seed=3))


@pytest_asyncio.fixture
async def actor() -> AsyncIterator[FakeAttention]:
    actor = await FakeAttention().start()
    yield actor
    await actor.server.close()


@pytest_asyncio.fixture
async def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Setting]:
    monkeypatch.setattr(cluster_view, "RETRY_S", 0.01)
    setting = Setting(tmp_path)
    yield setting
    setting.following.cancel()
    await asyncio.gather(setting.following, return_exceptions=True)
    await setting.backend.close()


async def test_requests_go_on_without_a_controller(setting: Setting, actor: FakeAttention) -> None:
    controller = setting.bring({"A0": actor})
    await eventually(setting.backend.ready)
    running = setting.start("running")
    await eventually(lambda: len(actor.running) == 1)
    actor.step(2)
    setting.controllers.clear()
    controller.die()
    with pytest.raises(Unavailable, match="controller"):
        await setting.backend.status()
    new = setting.start("new")
    await eventually(lambda: len(actor.running) == 2)
    assert setting.backend.ready()
    actor.finish()
    assert (await running, await new) == (reply(request("running")), reply(request("new")))
    assert setting.backend.ready()


async def test_a_broken_stream_is_mended_without_a_controller(setting: Setting, actor: FakeAttention) -> None:
    relay = Relay(actor.address)
    actor.address = await relay.start()
    controller = setting.bring({"A0": actor})
    await eventually(setting.backend.ready)
    setting.controllers.clear()
    controller.die()
    running = setting.start("r")
    await eventually(lambda: len(actor.running) == 1)
    actor.step(2)
    relay.cut()
    await eventually(lambda: list(actor.running) == ["r~2"])
    assert setting.backend.ready()
    actor.finish()
    assert await running == reply(request("r"))
    await setting.backend.close()
    await relay.close()


async def test_a_controller_that_has_only_just_begun_changes_nothing(setting: Setting, actor: FakeAttention) -> None:
    setting.bring({"A0": actor}).die()
    first = setting.bring({"A0": actor})
    await eventually(setting.backend.ready)
    running = setting.start("r")
    await eventually(lambda: len(actor.running) == 1)
    second = setting.bring({}, "starting")
    first.die()
    await eventually(lambda: second.views == 1)
    for _ in range(100):
        await asyncio.sleep(0)
    assert (setting.backend.ready(), actor.server.streams) == (True, 1)
    other = await FakeAttention().start()
    await second.change({"A1": other}, "ready", ["A0"])
    await eventually(lambda: list(other.running) == ["r~2"])
    other.finish()
    assert await running == reply(request("r"))
    await eventually(lambda: actor.server.streams == 0)
    await setting.backend.close()
    await other.server.close()


async def test_a_silent_controller_is_given_up_on(
    setting: Setting, actor: FakeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.bring({"A0": actor})
    await eventually(setting.backend.ready)
    monkeypatch.setattr("actors.ingress.STATUS_TIMEOUT_S", 0.01)
    with pytest.raises(Unavailable, match=r"did not answer in 0\.01 s"):
        await setting.backend.status()
    assert await setting.backend.metrics() == [("afd_ready", {}, 1.0), ("afd_stale_epoch_tokens", {}, 0.0)]


async def test_a_cluster_that_stops_leaves_nobody_waiting(setting: Setting, actor: FakeAttention) -> None:
    controller = setting.bring({"A0": actor})
    await eventually(setting.backend.ready)
    running = setting.start("r")
    await eventually(lambda: len(actor.running) == 1)
    await controller.change({"A0": actor}, "stopping")
    await eventually(lambda: not setting.backend.ready())
    await actor.die()
    with pytest.raises(Unavailable, match="the server is stopping"):
        await running
