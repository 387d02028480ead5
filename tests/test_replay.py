"""Requests go on with another attention actor, token for token, whatever becomes of theirs; real token streams, no Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from actors.attention_pool import AttentionPool
from actors.course import MAX_ENGINE_FAILURES
from actors.http.backend import Unavailable
from afd_ray.request import KVTicket, Request, SamplingParams, TokenOutput
from tests.attention_fake import TIMEOUT_S, FakeAttention, Relay, connect, eventually, reply


class Client:
    """Reads one request to its end."""

    def __init__(self, pool: AttentionPool, name: str, **params: Any) -> None:
        self.request = Request(name, (1, 2, 3), SamplingParams(**{"max_tokens": 12, "seed": 5, **params}))
        self.outputs: list[TokenOutput] = []
        self.task = asyncio.create_task(self._read(pool))

    async def _read(self, pool: AttentionPool) -> None:
        async with aclosing(pool.generate(self.request)) as outputs:
            async for output in outputs:
                self.outputs.append(output)

    @property
    def tokens(self) -> list[int | None]:
        return [output.token_id for output in self.outputs]

    async def has(self, count: int) -> None:
        await eventually(lambda: len(self.outputs) >= count)

    async def ended_as_undisturbed(self) -> None:
        await asyncio.wait_for(self.task, TIMEOUT_S)
        assert self.tokens == reply(self.request)
        assert [output.finish_reason for output in self.outputs] == [None] * 11 + ["length"]
        assert {output.request_id for output in self.outputs} == {self.request.id}


class Cluster:
    """Actors by id, and a pool that follows them."""

    def __init__(self) -> None:
        self.actors: dict[str, FakeAttention] = {}
        self.moved = 0
        self.pool = AttentionPool(connect, max_queued=64, patience_s=TIMEOUT_S, on_moved=self._count)

    async def start(self, *names: str) -> None:
        """Actors of these ids, new; the pool does not know of them yet."""
        for name in names:
            self.actors[name] = await FakeAttention().start()

    def view(self, *names: str, lost: tuple[str, ...] = ()) -> None:
        self.pool.follow({name: self.actors[name].address for name in names}, lost)

    async def live(self, *names: str) -> None:
        await self.start(*[name for name in names if name not in self.actors])
        self.view(*names)
        assert await self.pool.settle() == []

    def at(self, client: Client, *elsewhere_than: str) -> str | None:
        """Which actor has this request."""
        name = client.request.id
        found = [n for n, a in self.actors.items() if any(i == name or i.startswith(f"{name}~") for i in a.running)]
        return next((n for n in found if n not in elsewhere_than), None)

    async def taken(self, client: Client, *elsewhere_than: str) -> FakeAttention:
        """The actor that has this request, as soon as one has."""
        await eventually(lambda: self.at(client, *elsewhere_than) is not None)
        return self.actors[self.at(client, *elsewhere_than) or ""]

    def _count(self) -> None:
        self.moved += 1


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    yield cluster
    await eventually(lambda: (cluster.pool.under_way, cluster.pool.queued) == (0, 0))
    await eventually(lambda: not any(actor.running or actor.server.requests for actor in cluster.actors.values()))
    await cluster.pool.close()
    for actor in cluster.actors.values():
        await eventually(lambda actor=actor: actor.server.streams == 0)  # type: ignore[misc]
        await actor.server.close()
    await eventually(lambda: len(asyncio.all_tasks()) == 1)


async def die(actor: FakeAttention) -> None:
    await actor.die()


async def move_out(actor: FakeAttention) -> None:
    actor.move_out()


async def fail(actor: FakeAttention) -> None:
    actor.fail("out of memory")


@pytest.mark.parametrize("disturb", [die, move_out, fail])
@pytest.mark.parametrize("tokens", [0, 1, 7])
async def test_it_goes_on_elsewhere(cluster: Cluster, disturb: Callable[[FakeAttention], Any], tokens: int) -> None:
    await cluster.live("A0", "A1")
    client = Client(cluster.pool, "r", logprobs=0)
    first = await cluster.taken(client)
    first.step(tokens)
    await client.has(tokens)
    assert cluster.pool.queued == (tokens == 0)
    await disturb(first)
    second = await cluster.taken(client)
    assert second is not first
    assert second.submitted == [("r~2", tuple(reply(client.request)[:tokens]))]
    second.finish()
    await client.ended_as_undisturbed()
    assert [output.logprob for output in client.outputs] == [-float(i) for i in range(1, 13)]
    assert cluster.moved == 1


async def test_all_die_then_one_comes(cluster: Cluster) -> None:
    await cluster.live("A0", "A1")
    clients = [Client(cluster.pool, f"r{index}") for index in range(4)]
    for actor in cluster.actors.values():
        await eventually(lambda actor=actor: len(actor.running) == 2)  # type: ignore[misc]
        actor.step(3)
    for client in clients:
        await client.has(3)
    for actor in list(cluster.actors.values()):
        await actor.die()
    await eventually(lambda: cluster.pool.live == 0)
    with pytest.raises(Unavailable, match="no attention actor"):
        await Client(cluster.pool, "new").task
    assert not any(client.task.done() for client in clients)
    cluster.actors.clear()
    await cluster.live("A2")
    await eventually(lambda: len(cluster.actors["A2"].running) == 4)
    cluster.actors["A2"].finish()
    for client in clients:
        await client.ended_as_undisturbed()


async def test_one_that_gave_it_back_gets_it_again_only_after_another_view(cluster: Cluster) -> None:
    await cluster.live("A0", "A1")
    client = Client(cluster.pool, "r")
    for actor in cluster.actors.values():
        actor.leaving = True
    await eventually(lambda: all(actor.submitted for actor in cluster.actors.values()))
    for _ in range(100):
        await asyncio.sleep(0)
    assert [len(actor.submitted) for actor in cluster.actors.values()] == [1, 1]
    cluster.actors["A0"].leaving = False
    cluster.view("A0")  # the resize was rolled back
    (await cluster.taken(client)).finish()
    await client.ended_as_undisturbed()


async def test_requests_on_an_actor_that_leaves_stay_until_it_gives_them_back(cluster: Cluster) -> None:
    await cluster.live("A0")
    client = Client(cluster.pool, "r")
    first = await cluster.taken(client)
    first.step(2)
    await client.has(2)
    await cluster.live("A1")
    first.step(2)
    await client.has(4)
    assert first.server.streams == 1
    first.move_out()
    (await cluster.taken(client)).finish()
    await client.ended_as_undisturbed()
    await eventually(lambda: first.server.streams == 0)


async def test_a_ticket_is_for_the_next_actor_alone(cluster: Cluster) -> None:
    await cluster.live("A0", "A1")
    client = Client(cluster.pool, "r")
    first = await cluster.taken(client)
    first.step(2)
    await client.has(2)
    ticket = KVTicket("10.0.0.1:5", b"key", 4, 4096)
    first.move_out({"r": ticket})
    second = await cluster.taken(client)
    assert second.tickets == {"r~2": ticket}
    await cluster.live("A2")
    await second.die()
    third = await cluster.taken(client)
    assert third.tickets == {"r~3": None}
    third.finish()
    await client.ended_as_undisturbed()


async def test_what_a_lost_actor_still_says_reaches_nobody(cluster: Cluster) -> None:
    """A stopped process that goes on: its stream is whole, and it has the request."""
    await cluster.live("A0", "A1")
    client = Client(cluster.pool, "r")
    first = await cluster.taken(client)
    first.step(2)
    await client.has(2)
    name = cluster.at(client)
    assert name is not None
    (other,) = {"A0", "A1"} - {name}
    stopped = dict(first.running)
    cluster.view(other, lost=(name,))
    second = await cluster.taken(client, name)
    first.running.update(stopped)
    first.step(5)
    second.step(1)
    await client.has(3)
    first.finish()
    second.finish()
    await client.ended_as_undisturbed()


async def test_another_actor_under_the_same_id_replaces_the_first(cluster: Cluster) -> None:
    await cluster.live("A0")
    client = Client(cluster.pool, "r")
    first = await cluster.taken(client)
    first.step(2)
    await client.has(2)
    cluster.actors["old"] = cluster.actors.pop("A0")
    await cluster.live("A0")
    (await cluster.taken(client, "old")).finish()
    await client.ended_as_undisturbed()
    await eventually(lambda: first.server.streams == 0)


async def test_it_returns_to_the_same_actor_when_only_the_stream_broke(cluster: Cluster) -> None:
    await cluster.start("A0")
    actor = cluster.actors["A0"]
    relay = Relay(actor.address)
    cluster.pool.follow({"A0": await relay.start()})
    await cluster.pool.settle()
    client = Client(cluster.pool, "r")
    (await cluster.taken(client)).step(3)
    await client.has(3)
    relay.cut()
    await eventually(lambda: actor.aborted == ["r"] and list(actor.running) == ["r~2"])
    actor.finish()
    await client.ended_as_undisturbed()
    await cluster.pool.close()
    await relay.close()


@pytest.mark.parametrize("where", ["at an actor", "between actors", "given back", "on another actor"])
async def test_a_client_that_leaves_leaves_nothing(cluster: Cluster, where: str) -> None:
    await cluster.live("A0", "A1")
    client = Client(cluster.pool, "r")
    first = await cluster.taken(client)
    first.step(2)
    await client.has(2)
    (second,) = [actor for actor in cluster.actors.values() if actor is not first]
    if where == "between actors":
        await second.die()
        await first.die()
        await eventually(lambda: cluster.pool.live == 0)
    elif where == "given back":
        second.leaving = True
        first.move_out()
        await eventually(lambda: len(second.submitted) == 1 and not second.server.requests)
    elif where == "on another actor":
        await first.die()
        await cluster.taken(client)
    client.task.cancel()
    await asyncio.gather(client.task, return_exceptions=True)
    assert (cluster.pool.under_way, cluster.pool.queued) == (0, 0)
    await eventually(lambda: not any(actor.running for actor in cluster.actors.values()))
    assert len(client.outputs) == 2


async def test_it_waits_so_long_for_an_actor_and_no_longer(cluster: Cluster) -> None:
    cluster.pool = AttentionPool(connect, max_queued=64, patience_s=0.05)
    await cluster.live("A0")
    client = Client(cluster.pool, "r")
    await (await cluster.taken(client)).die()
    with pytest.raises(Unavailable, match=r"no attention actor to go on with in 0.05 s: the token stream from .* broke"):
        await asyncio.wait_for(client.task, TIMEOUT_S)


async def test_it_does_not_wait_once_no_actor_will_come(cluster: Cluster) -> None:
    await cluster.live("A0")
    waiting = Client(cluster.pool, "r")
    await (await cluster.taken(waiting)).die()
    await eventually(lambda: cluster.pool.live == 0)
    cluster.pool.end("the server is stopping")
    with pytest.raises(Unavailable, match="the server is stopping"):
        await asyncio.wait_for(waiting.task, TIMEOUT_S)
    with pytest.raises(Unavailable, match="the server is stopping"):
        await Client(cluster.pool, "new").task
    await cluster.live("A1")
    late = Client(cluster.pool, "late")
    (await cluster.taken(late)).finish()
    await late.ended_as_undisturbed()


async def test_stop_all_ends_what_is_under_way(cluster: Cluster) -> None:
    await cluster.live("A0")
    clients = [Client(cluster.pool, f"r{index}") for index in range(3)]
    await eventually(lambda: len(cluster.actors["A0"].running) == 3)
    cluster.pool.stop_all("the server is stopping")
    for client in clients:
        with pytest.raises(Unavailable, match="the server is stopping"):
            await asyncio.wait_for(client.task, TIMEOUT_S)
    await eventually(lambda: len(cluster.actors["A0"].aborted) == 3)


async def test_a_request_that_engines_fail_of_does_not_take_them_all(cluster: Cluster) -> None:
    names = [f"A{index}" for index in range(MAX_ENGINE_FAILURES + 1)]
    await cluster.live(*names)
    client = Client(cluster.pool, "r")
    for _ in range(MAX_ENGINE_FAILURES):
        (await cluster.taken(client)).fail("index out of range")
    with pytest.raises(Unavailable, match="index out of range"):
        await asyncio.wait_for(client.task, TIMEOUT_S)
    assert sum(len(actor.submitted) for actor in cluster.actors.values()) == MAX_ENGINE_FAILURES


async def test_an_error_of_the_request_itself_ends_it(cluster: Cluster) -> None:
    await cluster.live("A0", "A1")
    client = Client(cluster.pool, "r")
    actor = await cluster.taken(client)
    actor.server.publish([TokenOutput("r", None, finish_reason="error", error="logits are not finite")])
    await asyncio.wait_for(client.task, TIMEOUT_S)
    (output,) = client.outputs
    assert (output.finish_reason, output.error, cluster.moved) == ("error", "logits are not finite", 0)
    actor.running.clear()


async def test_a_refusal_is_the_clients_only_before_its_first_token(cluster: Cluster) -> None:
    await cluster.live("A0", "A1")
    client = Client(cluster.pool, "r")
    first = await cluster.taken(client)
    first.step(2)
    await client.has(2)
    (second,) = [actor for actor in cluster.actors.values() if actor is not first]
    second.refusal = ValueError("prompt must leave room in the context of 4 tokens")
    first.move_out()
    await eventually(lambda: len(second.submitted) == 1)
    await cluster.live(*cluster.actors, "A2")
    await eventually(lambda: bool(cluster.actors["A2"].running))
    cluster.actors["A2"].finish()
    await client.ended_as_undisturbed()
    cluster.view(next(name for name, actor in cluster.actors.items() if actor is second))
    with pytest.raises(ValueError, match="must leave room"):
        await Client(cluster.pool, "new").task


async def test_a_request_that_has_all_its_tokens_just_ends(cluster: Cluster) -> None:
    """Should an actor be lost between a last token and saying that it was the last."""
    await cluster.live("A0", "A1")
    full, stopped = Client(cluster.pool, "full", max_tokens=1), Client(cluster.pool, "stopped", stop_token_ids=(9,))
    await eventually(lambda: all(actor.running for actor in cluster.actors.values()))
    for actor in cluster.actors.values():
        (name,) = actor.running
        actor.server.publish([TokenOutput(name, 9)])
    await full.has(1)
    await stopped.has(1)
    for actor in cluster.actors.values():
        await actor.die()
    await asyncio.wait_for(asyncio.gather(full.task, stopped.task), TIMEOUT_S)
    assert [(output.token_id, output.finish_reason) for output in full.outputs] == [(9, None), (None, "length")]
    assert [(output.token_id, output.finish_reason) for output in stopped.outputs] == [(9, None), (None, "stop")]
    assert sum(len(actor.submitted) for actor in cluster.actors.values()) == 2


async def test_a_token_of_an_earlier_epoch_than_another_stream_has_reached_is_counted(cluster: Cluster) -> None:
    await cluster.start("A0", "A1")
    cluster.view("A0", "A1")
    await cluster.pool.settle()
    clients = [Client(cluster.pool, name) for name in ("r", "s")]
    old, new = cluster.actors["A0"], cluster.actors["A1"]
    await eventually(lambda: bool(old.running and new.running))
    new.epoch = 1
    old.epoch = 1
    old.step()
    new.step()
    await eventually(lambda: all(len(client.outputs) == 1 for client in clients))
    assert (cluster.pool.succession.newest, cluster.pool.succession.stale) == (1, 0)
    new.epoch = 2
    new.step()
    await eventually(lambda: cluster.pool.succession.newest == 2)
    assert cluster.pool.succession.stale == 0
    old.step(2)
    await eventually(lambda: cluster.pool.succession.stale == 2)
    old.finish()
    new.finish()
    for client in clients:
        await client.ended_as_undisturbed()
