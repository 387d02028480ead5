"""Real engines behind real token streams: a request goes on with another one as if nothing had been, whatever it asks for. No Ray."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
import ray

from actors import place
from actors.attention import AttentionActor
from actors.attention_pool import AttentionPool
from actors.collective import AFDGroup
from afd_ray.config import parse_config
from afd_ray.membership.epoch import Epoch
from afd_ray.request import Request, SamplingParams, TokenOutput
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
        self.actors = [AttentionActor(f"attention-{index}", config, SECRET) for index in range(count)]
        self.addresses: dict[str, str] = {}
        self.moved = 0
        self.pool = AttentionPool(connect, max_queued=64, patience_s=TIMEOUT_S, on_moved=self._count)
        self.outputs: dict[str, list[TokenOutput]] = {}

    async def start(self) -> None:
        epoch = Epoch(1, 1, 1, 0, 1)
        for actor in self.actors:
            identity = await actor.load(1)
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
            async with aclosing(self.pool.generate(Request(name, PROMPT, ASKED[name]))) as outputs:
                async for output in outputs:
                    self.outputs[name].append(output)

        async def all_kinds() -> None:
            await asyncio.gather(*map(one, ASKED))

        return asyncio.create_task(all_kinds())

    async def each_has(self, tokens: int) -> None:
        await eventually(lambda: all(len(outputs) >= tokens for outputs in self.outputs.values()))

    def _count(self) -> None:
        self.moved += 1

    async def close(self) -> None:
        await self.pool.close()
        for actor in self.actors:
            await actor.leave()


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
    await asyncio.wait_for(engines.generate(), TIMEOUT_S)
    undisturbed = engines.outputs
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
    for name, outputs in engines.outputs.items():
        assert [(o.token_id, o.finish_reason) for o in outputs] == [(o.token_id, o.finish_reason) for o in undisturbed[name]]
    # A prompt computed anew sums in another order: the last bits of a logprob differ.
    scored, before = (run["penalised"] for run in (engines.outputs, undisturbed))
    assert [o.logprob for o in scored] == pytest.approx([o.logprob for o in before], abs=1e-4)
    assert [len(o.top_logprobs) for o in scored] == [3] * MAX_TOKENS
    assert (engines.pool.under_way, engines.pool.queued) == (0, 0)
    for actor in engines.actors:
        assert await actor.check_integrity() == []
        assert (await actor.status())["kv_used"] == 0
