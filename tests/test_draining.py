"""The server is told to stop: no new request, what is in progress finishes in time or ends with an error, a second signal stops at once."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from ray.serve._private.long_poll import LongPollClient, LongPollState

from actors.cluster import ClusterError
from actors.draining import Replicas, _chosen, drain, polling_ended
from actors.http.app import create_app
from actors.ingress import ClusterBackend
from actors.serve import finish, stop_signals
from tests.attention_fake import TIMEOUT_S, FakeAttention, eventually
from tests.controller_fake import FakeController, Method
from tests.ingress_fake import write_tokenizer


async def test_an_ingress_that_drains(tmp_path: Path) -> None:
    actor = await FakeAttention().start()
    controller = FakeController(write_tokenizer(tmp_path), {"A0": actor})
    backend = ClusterBackend(lambda: controller, ingress_id="i", max_queued=4)
    await backend.refresh()
    transport = httpx.ASGITransport(create_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=TIMEOUT_S) as client:
        body = {"prompt": [1, 2], "max_tokens": 3, "seed": 1, "ignore_eos": True}
        finishing = asyncio.create_task(client.post("/v1/completions", json=body))
        await eventually(lambda: len(actor.running) == 1)
        actor.step()
        backend.drain()
        for answer in (
            await client.post("/v1/completions", json=body),
            await client.get("/ready"),
            await client.post("/admin/scale", json={"attention": 2}),
            await client.post("/admin/rebalance"),
        ):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json()["error"]["message"] == "the server is stopping"
        assert (await client.get("/health")).status_code == 200
        actor.finish()
        assert (await finishing).json()["usage"]["completion_tokens"] == 3
    await backend.close()
    await actor.server.close()


async def test_its_status_says_that_it_is_stopping(tmp_path: Path) -> None:
    async def status() -> dict[str, str]:
        return {"state": "ready"}

    controller = FakeController(tmp_path, {})
    controller.status = Method(status)
    backend = ClusterBackend(lambda: controller, ingress_id="i", max_queued=4)
    assert await backend.status() == {"state": "ready"}
    backend.drain()
    assert await backend.status() == {"state": "stopping"}
    await backend.close()


async def test_a_resize_that_is_under_way_can_still_be_called_off(tmp_path: Path) -> None:
    async def scale(cancel: bool) -> dict[str, bool]:
        return {"cancelled": cancel}

    controller = FakeController(tmp_path, {})
    controller.scale = Method(scale)
    backend = ClusterBackend(lambda: controller, ingress_id="i", max_queued=4)
    backend.drain()
    assert await backend.scale({"cancel": True}) == {"cancelled": True}
    await backend.close()


async def test_what_does_not_finish_in_time_ends_with_an_error(tmp_path: Path) -> None:
    actor = await FakeAttention().start()
    controller = FakeController(write_tokenizer(tmp_path), {"A0": actor})
    backend = ClusterBackend(lambda: controller, ingress_id="i", max_queued=4)
    await backend.refresh()
    transport = httpx.ASGITransport(create_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=TIMEOUT_S) as client:
        whole, streamed = (
            asyncio.create_task(client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 9, "stream": stream}))
            for stream in (False, True)
        )
        await eventually(lambda: len(actor.running) == 2)
        actor.step()
        await eventually(lambda: backend._view.pool.queued == 0)
        backend.drain()
        backend.stop_all()
        assert ((await whole).status_code, (await whole).json()["error"]["code"]) == (503, "unavailable")
        assert "the server is stopping" in (await streamed).text
        assert (await streamed).text.endswith("data: [DONE]\n\n")
    await eventually(lambda: len(actor.aborted) == 2)
    await backend.close()
    await actor.server.close()


class FakeReplicas:
    """Has as many requests in progress as `left` says, the last of it for ever."""

    def __init__(self, *left: int, then: threading.Event | None = None) -> None:
        self.left = list(left)
        self.then = then
        self.asked: list[bool] = []

    def drain(self, at_once: bool = False) -> int:
        self.asked.append(at_once)
        if len(self.left) > 1:
            return self.left.pop(0)
        if self.then is not None:
            self.then.set()
        return self.left[0]


def drained(replicas: FakeReplicas, at_once: threading.Event, timeout_s: float) -> list[bool]:
    drain(cast(Replicas, replicas), at_once, timeout_s)
    return replicas.asked


def test_it_waits_until_nothing_is_in_progress() -> None:
    assert drained(FakeReplicas(2, 1, 0), threading.Event(), TIMEOUT_S) == [False, False, False]


def test_it_waits_so_long_and_then_ends_the_rest() -> None:
    assert drained(FakeReplicas(2), threading.Event(), 0) == [False, True]


def test_a_second_signal_ends_the_wait() -> None:
    at_once = threading.Event()
    assert drained(FakeReplicas(3, 3, then=at_once), at_once, TIMEOUT_S) == [False, False]


def test_an_ingress_that_does_not_answer_is_an_error_to_a_drain_and_none_to_a_stop() -> None:
    class Silent:
        def drain(self, at_once: bool = False) -> int:
            raise ClusterError("the ingress does not answer: it is gone")

    replicas = cast(Replicas, Silent())
    with pytest.raises(ClusterError):
        drain(replicas, threading.Event(), TIMEOUT_S)
    finish(replicas, threading.Event(), TIMEOUT_S)


class FakeServeController:
    """Answers a poll when the test says so."""

    def __init__(self) -> None:
        self.polls: list[Callable[[Any], None]] = []
        self.polled = threading.Event()
        self.listen_for_change = Method(self._listen)  # type: ignore[arg-type]

    def _listen(self, snapshots: object) -> Any:
        self.polled.set()
        return SimpleNamespace(_on_completed=self.polls.append)


def test_nothing_of_serve_polls_when_the_drain_is_over() -> None:
    controller, loop = FakeServeController(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with polling_ended():
            client = LongPollClient(controller, {}, call_in_event_loop=loop, client_id="a router")
            assert controller.polled.wait(TIMEOUT_S)
        controller.polls[0](LongPollState.TIME_OUT)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(TIMEOUT_S)
        assert (client.is_running, len(controller.polls)) == (False, 1)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize(("there", "name"), [(["default"], None), (["afd", "other"], "afd")])
def test_the_only_application_need_not_be_named(there: list[str], name: str | None) -> None:
    assert _chosen(there, name, "auto") == there[0]


@pytest.mark.parametrize(
    ("there", "name", "said"),
    [([], None, "there is none"), (["afd", "other"], None, "there are afd, other"), (["default"], "afd", "there are default")],
)
def test_an_application_that_is_not_there_is_told_with_those_that_are(there: list[str], name: str | None, said: str) -> None:
    with pytest.raises(ClusterError, match=f"^--application: .*{said}$"):
        _chosen(there, name, "auto")


def test_signals_are_told_apart() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as (stop, at_once):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(TIMEOUT_S)
        assert not at_once.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert at_once.wait(TIMEOUT_S)
    assert signal.getsignal(signal.SIGTERM) is before
