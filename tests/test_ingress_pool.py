"""Routing over attention actors, the queue limit, and following a cluster that changes; real token streams, no Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from actors.attention_pool import AttentionPool
from actors.http.backend import Overloaded, Unavailable
from actors.ingress import ClusterBackend
from actors.token_client import TokenStreamClient
from actors.token_server import TokenStreamServer
from afd_ray.metrics import Sample
from afd_ray.request import KVTicket, Request, SamplingParams, TokenOutput
from tests.ingress_fake import write_tokenizer

SECRET = b"s" * 32
TIMEOUT_S = 30


class Actor:
    """An attention actor that answers when it is told to."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.aborted: list[str] = []
        self.changed = asyncio.Event()
        self.server = TokenStreamServer(self.submit, self.abort, secret=SECRET)
        self.address = ""

    async def start(self) -> "Actor":
        self.address = f"127.0.0.1:{await self.server.start()}"
        return self

    def submit(self, request: Request, generated: tuple[int, ...], ticket: KVTicket | None) -> None:
        self.requests.append(request.id)
        self.changed.set()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.changed.set()

    def answer(self, request_id: str, *, last: bool = True) -> None:
        self.server.publish([TokenOutput(request_id, 7, finish_reason="length" if last else None)])

    async def until(self, *, requests: int = 0, aborted: int = 0) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.requests) < requests or len(self.aborted) < aborted:
                self.changed.clear()
                await self.changed.wait()


async def connect(address: str) -> TokenStreamClient:
    return await TokenStreamClient.connect(address, secret=SECRET, ingress_id="test", timeout_s=TIMEOUT_S)


@pytest_asyncio.fixture
async def actors() -> AsyncIterator[list[Actor]]:
    actors = [await Actor().start() for _ in range(2)]
    yield actors
    for actor in actors:
        await actor.server.close()


@pytest_asyncio.fixture
async def pool(actors: list[Actor]) -> AsyncIterator[AttentionPool]:
    pool = AttentionPool(connect, max_queued=4)
    pool.follow({f"A{index}": actor.address for index, actor in enumerate(actors)})
    assert await pool.settle() == []
    yield pool
    await pool.close()


def start(pool: AttentionPool, name: str, **params: Any) -> "asyncio.Task[list[TokenOutput]]":
    async def collect() -> list[TokenOutput]:
        async with asyncio.timeout(TIMEOUT_S):
            return [output async for output in pool.generate(Request(name, (1,), SamplingParams(**params)))]

    return asyncio.create_task(collect())


async def test_requests_go_where_the_least_is_outstanding(actors: list[Actor], pool: AttentionPool) -> None:
    tasks = [start(pool, "long", max_tokens=1000)]
    await actors[0].until(requests=1)
    tasks.append(start(pool, "short", max_tokens=1))
    await actors[1].until(requests=1)
    tasks.append(start(pool, "third"))
    await actors[1].until(requests=2)
    assert (actors[0].requests, actors[1].requests) == (["long"], ["short", "third"])
    actors[0].answer("long")
    await tasks[0]
    tasks.append(start(pool, "fourth"))
    await actors[0].until(requests=2)
    for actor in actors:
        for name in actor.requests:
            actor.answer(name)
    await asyncio.gather(*tasks)
    assert pool.queued == 0


async def test_the_queue_is_what_waits_for_its_first_token(actors: list[Actor], pool: AttentionPool) -> None:
    tasks = [start(pool, f"r{index}") for index in range(4)]
    for actor in actors:
        await actor.until(requests=2)
    with pytest.raises(Overloaded, match="queue is full: 4 requests wait") as refused_for:
        await start(pool, "refused")
    assert refused_for.value.retry_after_s == 1  # nothing has left the queue yet
    async with aclosing(pool.generate(Request("refused", (1,)))) as refused:
        with pytest.raises(Overloaded):
            await anext(refused)
    actors[0].answer(actors[0].requests[0])
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
    tasks.append(start(pool, "admitted"))
    await actors[0].until(requests=3)
    for actor in actors:
        for name in actor.requests:
            actor.answer(name)
    await asyncio.gather(*tasks)
    assert pool.queued == 0


async def test_an_abandoned_request_leaves_the_queue(actors: list[Actor], pool: AttentionPool) -> None:
    task = start(pool, "r")
    await actors[0].until(requests=1)
    task.cancel()
    await actors[0].until(aborted=1)
    await asyncio.gather(task, return_exceptions=True)
    assert (pool.queued, actors[0].server.requests) == (0, 0)


async def test_following_tells_what_cannot_be_reached(actors: list[Actor], pool: AttentionPool) -> None:
    await actors[0].server.close()
    await eventually(lambda: pool.live == 1)
    (failure,) = await pool.settle()
    assert failure.startswith("A0: no token stream")
    pool.follow({})
    assert await pool.settle() == []
    with pytest.raises(Unavailable, match="no attention actor"):
        await start(pool, "r")


async def test_an_actor_let_go_of_finishes_its_requests(actors: list[Actor], pool: AttentionPool) -> None:
    task = start(pool, "r")
    await actors[0].until(requests=1)
    pool.follow({"A1": actors[1].address})
    assert pool.live == 1
    actors[0].answer("r", last=False)
    await eventually(lambda: pool.queued == 0)
    assert actors[0].server.streams == 1
    actors[0].answer("r")
    assert [output.token_id for output in await task] == [7, 7]
    await eventually(lambda: actors[0].server.streams == 0)


class Method:
    def __init__(self, call: Any) -> None:
        self.remote = call


class Controller:
    """The controller's handle, as an ingress calls it."""

    def __init__(self, directory: Path, actors: list[Actor]) -> None:
        self.actors = actors
        self.epoch = 1
        self.views = 0
        self.condition = asyncio.Condition()
        self.directory = str(directory)
        names = ("ingress_view", "changed", "metrics", "scale")
        for name in names:
            setattr(self, name, Method(getattr(self, f"_{name}")))

    async def move(self, actors: list[Actor]) -> None:
        async with self.condition:
            self.actors, self.epoch = actors, self.epoch + 1
            self.condition.notify_all()

    async def _ingress_view(self) -> dict[str, Any]:
        self.views += 1
        model = {"name": "m", "directory": self.directory, "max_context": 64, "vocab_size": 300}
        attention = [{"id": f"A{index}", "address": actor.address} for index, actor in enumerate(self.actors)]
        return {"state": "ready", "epoch": self.epoch, "secret": SECRET, "model": model, "attention": attention}

    async def _changed(self, epoch: int, state: str) -> tuple[int, str]:
        async with self.condition:
            await self.condition.wait_for(lambda: (self.epoch, "ready") != (epoch, state))
        return self.epoch, "ready"

    async def _metrics(self) -> list[Sample]:
        return [Sample("afd_epoch", {}, self.epoch)]

    async def _scale(self, attention: int) -> dict[str, Any]:
        raise ValueError("attention must be at most 2, got 9")


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_backend_follows_the_cluster(actors: list[Actor], tmp_path: Path) -> None:
    controller = Controller(write_tokenizer(tmp_path), actors[:1])
    found: list[Any] = []

    def find() -> Any:
        if not found:
            raise ValueError("no such actor")
        return found[0]

    backend = ClusterBackend(find, ingress_id="i", max_queued=4)
    assert not backend.ready()
    with pytest.raises(Unavailable, match="starting"):
        _ = backend.model
    with pytest.raises(Unavailable, match="no such actor"):
        await backend.status()
    found.append(controller)
    following = asyncio.create_task(backend.follow())
    await eventually(backend.ready)
    assert (backend.model.name, backend.model.max_context, backend.model.tokenizer is not None) == ("m", 64, True)
    await controller.move(actors[1:])
    await eventually(lambda: actors[1].server.streams == 1 and actors[0].server.streams == 0)
    await eventually(backend.ready)
    assert Sample("afd_ready", {}, 1.0) in await backend.metrics()
    with pytest.raises(ValueError, match="at most 2"):
        await backend.scale({"attention": 9})
    for _ in range(200):
        await asyncio.sleep(0)
    assert controller.views <= 2  # one a change
    following.cancel()
    await backend.close()
    await eventually(lambda: actors[1].server.streams == 0)
