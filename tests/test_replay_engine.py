"""Real engines behind real token streams: a request goes on with another one as if nothing had been, whatever it asks for. No Ray."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
import ray

from actors import departure, place
from actors.attention import AttentionActor
from actors.attention_pool import AttentionPool
from actors.collective import AFDGroup
from afd_ray.config import parse_config
from afd_ray.engine.left_behind import LeftBehind
from afd_ray.handoff import kv_fetcher
from afd_ray.handoff.kv_server import Lot
from afd_ray.handoff.kv_wire import KVOrder
from afd_ray.membership.epoch import Epoch
from afd_ray.request import KVTicket, Request, SamplingParams, TokenOutput
from tests.attention_fake import SECRET, connect, eventually

TIMEOUT_S = 30.0
MAX_TOKENS = 60
PROMPT = (5, 9, 200, 31, 7)
ASKED = {
    "greedy": SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True),
    "seeded": SamplingParams(max_tokens=MAX_TOKENS, temperature=1.2, top_p=0.95, seed=11, ignore_eos=True),
    "penalised": SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        seed=12,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        logprobs=3,
        ignore_eos=True,
    ),
}


class Engines:
    """Colocated attention actors, each in an epoch of its own, slow enough to be interrupted."""

    def __init__(self, directory: Path, count: int) -> None:
        raw = {"model": {"path": str(directory)}, "attention": {"kv_cache": {"num_blocks": 200}, "pace": {"base_us": 500}}}
        config = parse_config(raw | {"ffn": {"colocated": True}})
        self.prompt = PROMPT
        self.actors = [AttentionActor(f"attention-{index}", config, SECRET) for index in range(count)]
        self.addresses: dict[str, str] = {}
        self.moved = 0
        self.pool = AttentionPool(connect, max_queued=64, patience_s=TIMEOUT_S, on_moved=self._count)
        self.outputs: dict[str, list[TokenOutput]] = {}

    async def start(self) -> None:
        epoch = Epoch(1, 1, 1, 0, 1)
        for actor in self.actors:
            identity = await actor.load(epoch)
            self.addresses[identity["id"]] = f"127.0.0.1:{identity['address'].rpartition(':')[2]}"
            endpoint = await actor.prepare(epoch, 0, f"afd-{identity['id']}-e1", 0.0)
            await actor.connect(1, {0: endpoint}, TIMEOUT_S)
            await actor.switch(1)
        self.view(*range(len(self.actors)))
        assert await self.pool.settle() == []

    def view(self, *indices: int) -> None:
        self.pool.follow({f"attention-{index}": self.addresses[f"attention-{index}"] for index in indices})

    def generate(self) -> "asyncio.Task[None]":
        """All kinds of request at once."""
        self.outputs = {name: [] for name in ASKED}

        async def one(name: str) -> None:
            async with aclosing(self.pool.generate(Request(name, self.prompt, ASKED[name]))) as outputs:
                async for output in outputs:
                    self.outputs[name].append(output)

        async def all_kinds() -> None:
            await asyncio.gather(*map(one, ASKED))

        return asyncio.create_task(all_kinds())

    async def each_has(self, tokens: int) -> None:
        await eventually(lambda: all(len(outputs) >= tokens for outputs in self.outputs.values()))

    def _count(self) -> None:
        self.moved += 1

    async def undisturbed(self) -> dict[str, list[TokenOutput]]:
        await asyncio.wait_for(self.generate(), TIMEOUT_S)
        return self.outputs

    async def moved_in(self, index: int) -> dict[str, float]:
        return dict((await self.actors[index].status())["moved_in"])

    async def left_nothing(self) -> None:
        assert (self.pool.under_way, self.pool.queued) == (0, 0)
        for actor in self.actors:
            assert await actor.check_integrity() == []
            assert (await actor.status())["kv_used"] == 0

    async def close(self) -> None:
        await self.pool.close()
        for actor in self.actors:
            await actor.leave()


def said(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[tuple[int | None, str | None]]]:
    return {name: [(output.token_id, output.finish_reason) for output in each] for name, each in outputs.items()}


@pytest_asyncio.fixture
async def engines(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engines]:
    class Context:
        def get_node_id(self) -> str:
            return "node"

    monkeypatch.setattr(place, "join_group", AFDGroup)
    monkeypatch.setattr(place, "leave_group", lambda name: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    engines = Engines(tiny_directory, 3)
    await engines.start()
    yield engines
    await engines.close()


async def test_streams_are_the_undisturbed_ones(engines: Engines) -> None:
    undisturbed = await engines.undisturbed()
    assert len({tuple(output.token_id for output in outputs) for outputs in undisturbed.values()}) == 3
    assert [len(outputs) for outputs in undisturbed.values()] == [MAX_TOKENS] * 3

    assert engines.moved == 0
    running = engines.generate()
    await engines.each_has(5)
    await engines.actors[0].move_out(2, TIMEOUT_S)
    await engines.each_has(20)
    await engines.actors[1]._tokens.close()  # as if its process had been killed
    engines.view(2)
    await asyncio.wait_for(running, TIMEOUT_S)
    assert engines.moved >= 2
    assert said(engines.outputs) == said(undisturbed)
    # A prompt computed anew sums in another order: the last bits of a logprob differ.
    scored, before = (run["penalised"] for run in (engines.outputs, undisturbed))
    assert [o.logprob for o in scored] == pytest.approx([o.logprob for o in before], abs=1e-4)
    assert [len(o.top_logprobs) for o in scored] == [3] * MAX_TOKENS
    await engines.left_nothing()


LONG_PROMPT = tuple(i * 7 % 500 for i in range(700))


async def test_keys_and_values_go_along_where_computing_them_again_takes_longer(engines: Engines) -> None:
    engines.prompt = LONG_PROMPT
    undisturbed = await engines.undisturbed()
    running = engines.generate()
    await engines.each_has(5)
    engines.view(0, 1)
    leaving = [engines.actors[2].move_out(2, TIMEOUT_S)]
    await engines.each_has(20)
    engines.view(0)
    leaving.append(engines.actors[1].move_out(2, TIMEOUT_S))
    moved = await asyncio.wait_for(asyncio.gather(*leaving), TIMEOUT_S)
    await asyncio.wait_for(running, TIMEOUT_S)
    assert said(engines.outputs) == said(undisturbed)
    counts = [await engines.moved_in(index) for index in range(3)]
    assert sum(count["with_kv"] for count in counts) == sum(moved) == engines.moved > 0
    assert sum(count["recomputed"] for count in counts) == 0
    assert sum(count["kv_bytes"] for count in counts) >= sum(moved) * 700 * 4 * 32 * 4
    await engines.left_nothing()


def close_the_door(leaver: AttentionActor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where the tickets say."""
    opened = departure.Departure.tickets

    def tickets(self: departure.Departure) -> dict[str, KVTicket | None]:
        given = opened(self)
        self._server.close()
        return given

    monkeypatch.setattr(departure.Departure, "tickets", tickets)
    monkeypatch.setattr(departure, "UNASKED_S", 0.01)


def refuse(leaver: AttentionActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeftBehind, "lend", lambda self, order: None)
    monkeypatch.setattr(departure, "UNASKED_S", 0.01)


def have_another_model(leaver: AttentionActor, monkeypatch: pytest.MonkeyPatch) -> None:
    leaver._model_digest += 1
    monkeypatch.setattr(departure, "UNASKED_S", 0.01)


def be_late(leaver: AttentionActor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives them only once nobody waits for them any more."""
    lend, late_s = departure.Departure._lend, 0.02
    monkeypatch.setattr(departure, "UNASKED_S", 0.2)
    monkeypatch.setattr(kv_fetcher, "LATE_S", late_s)
    monkeypatch.setattr(kv_fetcher, "LATE_FACTOR", 0.0)

    def lend_late(self: departure.Departure, order: KVOrder) -> Lot | None:
        lot = lend(self, order)
        threading.Event().wait(5 * late_s)
        return lot

    monkeypatch.setattr(departure.Departure, "_lend", lend_late)


FULL = [pytest.param(spoil, marks=pytest.mark.full) for spoil in (close_the_door, have_another_model)]


@pytest.mark.parametrize("spoil", [refuse, be_late, *FULL])
async def test_a_request_whose_keys_and_values_cannot_be_had_is_computed_again(
    engines: Engines, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[AttentionActor, pytest.MonkeyPatch], None]
) -> None:
    engines.prompt = LONG_PROMPT
    undisturbed = await engines.undisturbed()
    running = engines.generate()
    await engines.each_has(5)
    spoil(engines.actors[2], monkeypatch)
    engines.view(0, 1)
    moved = await asyncio.wait_for(engines.actors[2].move_out(2, TIMEOUT_S), TIMEOUT_S)
    await asyncio.wait_for(running, TIMEOUT_S)
    assert said(engines.outputs) == said(undisturbed)
    counts = [await engines.moved_in(index) for index in range(2)]
    assert sum(count["failed"] for count in counts) == sum(count["recomputed"] for count in counts) == moved > 0
    assert sum(count["with_kv"] for count in counts) == 0
    await engines.left_nothing()


async def test_others_go_on_while_a_fetch_is_under_way(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engines.prompt = LONG_PROMPT
    undisturbed = await engines.undisturbed()
    lend, may_lend = departure.Departure._lend, threading.Event()

    def lend_later(self: departure.Departure, order: KVOrder) -> Lot | None:
        assert may_lend.wait(TIMEOUT_S)
        return lend(self, order)

    monkeypatch.setattr(departure.Departure, "_lend", lend_later)
    monkeypatch.setattr(departure, "UNASKED_S", TIMEOUT_S)
    monkeypatch.setattr(kv_fetcher, "LATE_S", TIMEOUT_S)
    running = engines.generate()
    await engines.each_has(5)
    engines.view(0)
    leaving = asyncio.ensure_future(engines.actors[2].move_out(2, TIMEOUT_S))
    await eventually(lambda: engines.moved > 0)
    async with aclosing(engines.pool.generate(Request("other", PROMPT, ASKED["greedy"]))) as outputs:
        assert len([output async for output in outputs]) == MAX_TOKENS
    assert (await engines.moved_in(0))["with_kv"] == 0
    assert not leaving.done()
    may_lend.set()
    moved = await asyncio.wait_for(leaving, TIMEOUT_S)
    await asyncio.wait_for(running, TIMEOUT_S)
    assert (await engines.moved_in(0))["with_kv"] == moved
    assert said(engines.outputs) == said(undisturbed)
    await engines.left_nothing()


async def test_what_takes_longer_to_fetch_is_computed_again_and_not_kept(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_fetcher, "UNKNOWN_LATENCY_S", 1000.0)
    monkeypatch.setattr(departure, "UNASKED_S", TIMEOUT_S)
    undisturbed = await engines.undisturbed()
    running = engines.generate()
    await engines.each_has(5)
    engines.view(0, 1)
    moved = await asyncio.wait_for(engines.actors[2].move_out(2, TIMEOUT_S), TIMEOUT_S)
    await asyncio.wait_for(running, TIMEOUT_S)
    assert said(engines.outputs) == said(undisturbed)
    counts = [await engines.moved_in(index) for index in range(2)]
    assert [sum(count[name] for count in counts) for name in ("with_kv", "recomputed", "failed")] == [0, moved, 0]
    await engines.left_nothing()


async def test_nothing_is_kept_where_there_is_no_time_to_fetch_it(engines: Engines) -> None:
    failure = engines.actors[2]._config.failure.model_copy(update={"drain_timeout_s": 0.0})
    engines.actors[2]._config = engines.actors[2]._config.model_copy(update={"failure": failure})
    running = engines.generate()
    await engines.each_has(5)
    engines.view(0, 1)
    await engines.actors[2].move_out(2, TIMEOUT_S)
    assert (await engines.actors[2].status())["kv_used"] == 0
    await asyncio.wait_for(running, TIMEOUT_S)
    await engines.left_nothing()
