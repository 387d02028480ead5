"""Members from epoch to epoch, without Ray: real step loops and real links in one process, calls in the controller's order."""

import asyncio
import gc
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import attention as attention_module
from actors import departure, observed, place
from actors import member as member_module
from actors.attention import AttentionActor
from actors.collective import AFDGroup
from actors.ffn import FFNActor
from actors.member import LEFT, Member
from actors.token_frames import Moved
from afd_ray.config import Config, parse_config
from afd_ray.measured import Measured
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.seat import Stale
from afd_ray.metrics import Sample
from afd_ray.models.checkpoint import Checkpoint, load_model
from afd_ray.models.step3 import FFNHalf, FFNShard
from afd_ray.request import Request, SamplingParams, TokenOutput

TIMEOUT_S = 20.0
MAX_TOKENS = 48
SECRET = b"s" * 32
PROMPT = (5, 9, 200, 31, 7)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups without Ray's registry, which wants an actor; and this process as every node."""

    class Context:
        def get_node_id(self) -> str:
            return "node"

    def join(world_size: int, rank: int, group_name: str) -> AFDGroup:
        return AFDGroup(world_size, rank, group_name)

    monkeypatch.setattr(place, "join_group", join)
    monkeypatch.setattr(place, "leave_group", lambda name: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(ray, "get_runtime_context", Context)


@pytest.fixture
def config(tiny_directory: Path) -> Config:
    kv_cache = {"num_blocks": 200}
    return parse_config({"model": {"path": str(tiny_directory)}, "attention": {"kv_cache": kv_cache}})


@pytest.fixture(scope="module")
def expected(tiny_directory: Path) -> list[int]:
    return load_model(Checkpoint.open(tiny_directory)).generate_greedy(PROMPT, MAX_TOKENS)


class Attention(AttentionActor):
    """Keeps what it answers, in place of a stream to an ingress."""

    def __init__(self, name: str, config: Config, secret: bytes) -> None:
        super().__init__(name, config, secret)
        self.answers: list[Any] = []
        self.answered = asyncio.Event()
        events = asyncio.get_running_loop()
        self._tokens.publish = lambda answers: events.call_soon_threadsafe(self.take, list(answers))  # type: ignore[method-assign]

    def take(self, answers: list[Any]) -> None:
        self.answers += answers
        self.answered.set()

    def submit(self, request_id: str, max_tokens: int = MAX_TOKENS) -> None:
        self._submit(Request(request_id, PROMPT, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)))

    async def until(self, enough: Any) -> list[Any]:
        async with asyncio.timeout(TIMEOUT_S):
            while not enough(self.answers):
                self.answered.clear()
                await self.answered.wait()
        return self.answers

    async def tokens(self, request_id: str) -> list[int]:
        def over(answers: list[Any]) -> bool:
            return any(a.request_id == request_id and a.finish_reason is not None for a in answers)

        answers = await self.until(over)
        return [a.token_id for a in answers if isinstance(a, TokenOutput) and a.request_id == request_id]


class Roster:
    """Members by id, asked as the controller asks them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.attention: list[Attention] = []
        self.ffn: list[FFNActor] = []

    @property
    def members(self) -> list[Member]:
        return [*self.attention, *self.ffn]

    async def load(self, epoch: Epoch) -> None:
        while len(self.attention) < epoch.attention:
            self.attention.append(Attention(f"attention-{len(self.attention)}", self.config, SECRET))
        while len(self.ffn) < epoch.ffn:
            self.ffn.append(FFNActor(f"ffn-{len(self.ffn)}", self.config, SECRET))
        model = Checkpoint.open(Path(self.config.model.path)).config
        await asyncio.gather(*(member.load(epoch) for member in self.attention[: epoch.attention]))
        for rank, member in zip(epoch.ffn_ranks, self.ffn, strict=False):
            await member.load(epoch.shard(rank, model), epoch.number)

    def of(self, epoch: Epoch) -> list[Member]:
        return [*self.attention[: epoch.attention], *self.ffn[: epoch.ffn]]

    async def stand_by(self, epoch: Epoch) -> None:
        await self.load(epoch)
        hands = self.of(epoch)
        name = f"afd-test-e{epoch.number}"
        endpoints = await asyncio.gather(*(m.prepare(epoch, rank, name, 0.0) for rank, m in enumerate(hands)))
        by_rank = dict(enumerate(endpoints))
        await asyncio.gather(*(m.connect(epoch.number, by_rank, TIMEOUT_S) for m in hands))

    async def enter(self, epoch: Epoch) -> list[float]:
        return await asyncio.gather(*(m.switch(epoch.number) for m in self.of(epoch)))

    async def form(self, epoch: Epoch) -> None:
        await self.stand_by(epoch)
        await self.enter(epoch)
        await asyncio.gather(*(m.retire(epoch.number) for m in self.members))

    async def leave(self) -> None:
        await asyncio.gather(*(m.leave() for m in self.members))


@asynccontextmanager
async def roster(config: Config, epoch: Epoch) -> AsyncIterator[Roster]:
    made = Roster(config)
    try:
        await made.form(epoch)
        yield made
    finally:
        await made.leave()


async def test_a_first_epoch_is_formed_as_any_other(config: Config, expected: list[int]) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        assert await attention.beat() == 1
        attention.submit("r")
        assert await attention.tokens("r") == expected
        status = await attention.status()
        assert (status["epoch"], status["rank"], status["draining"]) == (1, 0, False)


async def test_a_resize_under_load_changes_no_token(config: Config, expected: list[int]) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        attention.submit("r")
        for number, (tensor, expert) in enumerate([(2, 1), (1, 2), (1, 1)], start=2):
            epoch = Epoch(number, 1, tensor, expert, number)
            await attention.until(lambda answers, n=number: len(answers) >= 5 * (n - 1))
            await made.stand_by(epoch)
            await attention.drain(number, TIMEOUT_S)
            assert attention._ready_loop().scheduler.in_flight == 0
            pauses = await made.enter(epoch)
            assert 0 < pauses[0] < 1000
            await asyncio.gather(*(m.retire(number) for m in made.members))
        assert await attention.tokens("r") == expected
        assert await attention.check_integrity() == []
        assert [await m.beat() for m in made.members] == [4, 4, 0]


async def test_a_rolled_back_resize_leaves_no_trace(config: Config, expected: list[int]) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        attention.submit("r")
        await made.stand_by(Epoch(2, 1, 2, 1, 3))
        await attention.drain(2, TIMEOUT_S)
        assert (await attention.status())["draining"]
        await attention.resume(2)
        await asyncio.gather(*(m.discard(2) for m in made.members))
        assert await attention.tokens("r") == expected
        assert await attention.lost(2) == LEFT
        assert made.ffn[0]._standby is None
        with pytest.raises(Stale, match="comes too late"):
            await attention.drain(2, TIMEOUT_S)
        await made.form(Epoch(3, 1, 2, 1, 3))
        attention.submit("s")
        assert await attention.tokens("s") == expected


async def test_a_late_word_about_an_epoch_that_was_given_up_ends_no_other_drain(config: Config) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        await attention.drain(2, TIMEOUT_S)
        await attention.resume(2)
        await attention.drain(4, TIMEOUT_S)
        await attention.resume(3)
        assert (await attention.status())["draining"]
        assert attention._ready_loop().draining
        await attention.resume(4)
        assert not attention._ready_loop().draining


async def test_an_attention_actor_that_nobody_tells_more_goes_on_by_itself(config: Config, expected: list[int]) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        attention.submit("r")
        await made.stand_by(Epoch(2, 1, 1, 1, 2))
        drained = asyncio.ensure_future(attention.drain(2, 0.01))
        assert await attention.tokens("r") == expected
        await asyncio.gather(drained, return_exceptions=True)  # the boundary may have come first, or the deadline
        await made.enter(Epoch(2, 1, 1, 1, 2))  # late, but decided
        attention.submit("s")
        assert await attention.tokens("s") == expected


async def test_who_stands_at_a_boundary_and_is_told_nothing_goes_on_long_before_the_deadline(
    config: Config, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "HELD_S", 0.01)
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        attention.submit("r")
        await made.stand_by(Epoch(2, 1, 1, 1, 2))
        await attention.drain(2, 1000 * TIMEOUT_S)
        assert await attention.tokens("r") == expected
        await made.enter(Epoch(2, 1, 1, 1, 2))
        attention.submit("s")
        assert await attention.tokens("s") == expected


async def test_members_that_lost_their_epoch_wait_for_another(config: Config, expected: list[int]) -> None:
    async with roster(config, Epoch(1, 1, 1, 2, 2)) as made:
        (attention,), (near, far) = made.attention, made.ffn
        attention.submit("r")
        await attention.until(lambda answers: len(answers) > 3)
        await far.leave()
        async with asyncio.timeout(TIMEOUT_S):
            reasons = await asyncio.gather(attention.lost(1), near.lost(1))
        assert all("edge to rank" in reason for reason in reasons)
        assert (await attention.status())["epoch"] is None
        attention.submit("s")
        made.ffn.remove(far)
        await made.form(Epoch(2, 1, 1, 1, 3))
        assert await attention.tokens("r") == expected
        assert await attention.tokens("s") == expected
        assert await attention.check_integrity() == []


async def test_waiting_for_another_epoch_is_bounded(config: Config, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "PATIENCE_S", 0.05)
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,), (ffn,) = made.attention, made.ffn
        attention.submit("r", 10_000)
        await ffn.leave()
        answers = await attention.until(lambda answers: answers and answers[-1].request_id == "r" and answers[-1].finish_reason)
        assert answers[-1].finish_reason == "error"
        assert "epoch 1 was lost" in answers[-1].error
        with pytest.raises(RuntimeError, match="no other came within"):
            attention.submit("s")
        made.ffn = []
        await made.form(Epoch(2, 1, 1, 1, 2))
        attention.submit("t")
        assert await attention.tokens("t") == expected


async def test_requests_move_out_and_stay(config: Config, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "UNASKED_S", 0.01)  # nobody goes on with them
    async with roster(config, Epoch(1, 2, 1, 1, 2)) as made:
        stays, goes = made.attention
        goes.submit("r", 10_000)
        goes.submit("s", 10_000)
        await goes.until(lambda answers: len(answers) > 6)
        assert await goes.move_out(2, TIMEOUT_S) == 2
        await goes.until(lambda answers: sum(isinstance(a, Moved) for a in answers) == 2)
        goes.submit("t")
        await goes.until(lambda answers: answers[-1] == Moved("t"))
        for request_id in "rs":
            own = [answer for answer in goes.answers if answer.request_id == request_id]
            assert [isinstance(answer, Moved) for answer in own] == [False] * (len(own) - 1) + [True]
        await goes.drain(2, TIMEOUT_S)
        assert goes._ready_loop().scheduler.kv_used == 0
        await goes.stay(2)
        goes.submit("u")
        assert await goes.tokens("u") == expected
        await goes.move_out(3, TIMEOUT_S)
        epoch = Epoch(3, 1, 1, 1, 2)
        await made.stand_by(epoch)
        await asyncio.gather(*(m.drain(3, TIMEOUT_S) for m in made.attention))
        await made.enter(epoch)
        await asyncio.gather(*(m.retire(3) for m in made.members))
        assert [await m.beat() for m in made.members] == [3, 0, 3]
        assert await goes.lost(1) == LEFT
        stays.submit("v")
        assert await stays.tokens("v") == expected


async def test_a_request_goes_on_after_the_tokens_it_has(config: Config, expected: list[int]) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        attention._submit(Request("r", PROMPT, params), expected[:9])
        assert await attention.tokens("r") == expected[9:]
        measured = Measured.load((await attention.status())["measured"])
        assert (measured.arrivals, measured.completions, measured.output_tokens) == (0, 1, MAX_TOKENS - 9)
        assert (measured.ttft_ms.count, measured.tpot_ms.count) == (0, MAX_TOKENS - 10)


async def test_an_actor_tells_ray_what_it_measured_until_it_leaves(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[str]] = {}
    both = asyncio.Event()

    class Exported:
        def publish(self, samples: list[Sample]) -> None:
            for sample in samples:
                told.setdefault(sample.labels["actor"], []).append(sample.name)
            if len(told) == 2:
                both.set()

    monkeypatch.setattr(observed, "PERIOD_S", 0.01)
    monkeypatch.setattr(observed, "RayMetrics", Exported)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        async with asyncio.timeout(TIMEOUT_S):
            await both.wait()
    assert "afd_requests_running" in told["attention-0"]
    assert "afd_ffn_rows_total" in told["ffn-0"]
    assert all(member._turning and member._turning.cancelling() for member in made.members)


async def test_an_ffn_rank_without_the_weights_takes_no_place(config: Config) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        with pytest.raises(ValueError, match="what rank 1 of epoch 2 needs is not loaded"):
            await made.ffn[0].prepare(Epoch(2, 1, 2, 1, 2), 1, "afd-test-e2", 0.0)


def held_by_process() -> dict[str, int]:
    """What a leak would add to."""
    gc.unfreeze()  # members freeze what there is when they start, here what other tests have left too
    gc.collect()
    mappings = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "segments": sum("/dev/shm/afd-ray-" in line for line in mappings),
        "names": len(list(Path("/dev/shm").glob(f"afd-ray-{os.getpid()}-*"))),
    }


async def test_nothing_is_left_of_epochs_that_are_over(config: Config, expected: list[int]) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,) = made.attention
        await made.form(Epoch(2, 1, 2, 1, 2))
        await made.form(Epoch(3, 1, 1, 1, 2))
        before = held_by_process()
        for number in range(4, 16, 3):
            attention.submit(f"r{number}")
            await made.stand_by(Epoch(number, 1, 2, 1, 2))  # given up
            await asyncio.gather(*(m.discard(number) for m in made.members))
            epoch = Epoch(number + 1, 1, 1, 2, 3)
            await made.stand_by(epoch)
            await attention.drain(number + 1, TIMEOUT_S)
            await made.enter(epoch)
            await asyncio.gather(*(m.retire(number + 1) for m in made.members))
            made.attention[0]._ready_loop().wire.mesh.close()  # lost
            await attention.lost(number + 1)
            await made.form(Epoch(number + 2, 1, 1, 1, 1))
            assert await attention.tokens(f"r{number}") == expected
        assert await attention.check_integrity() == []
        after = held_by_process()
        assert {name: after[name] for name in after if after[name] > before[name]} == {}, before


async def test_only_experts_that_are_not_held_are_read(config: Config) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (ffn,) = made.ffn
        model = ffn._ready_half().config
        half = ffn._ready_half()
        assert (await ffn.load(Epoch(2, 1, 1, 2, 2).shard(1, model), 2))["moved_experts"] == 0
        assert (await ffn.load(Epoch(3, 1, 2, 1, 2).shard(1, model), 3))["moved_experts"] == 8
        assert ffn._ready_half() is half
        await made.form(Epoch(4, 1, 1, 2, 2))
        assert (await ffn.status())["experts"] == [0, 1, 2, 3]
        assert (await ffn.load(FFNShard((2, 3, 4)), 5))["moved_experts"] == 1
        assert (await ffn.load(FFNShard((2, 3, 4, 5)), 6))["moved_experts"] == 1, "also from what was loaded for the epoch before"
        await ffn.discard(6)
        assert ffn._held() == [ffn._ready_half()]


async def test_a_slow_load_does_not_replace_what_a_later_one_brought(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (ffn,) = made.ffn
        build, begun, may_end = ffn._build, threading.Event(), threading.Event()

        def slow(shard: FFNShard, held: FFNHalf | None) -> FFNHalf:
            if shard.experts == (0, 1):
                begun.set()
                may_end.wait(TIMEOUT_S)
            return build(shard, held)

        monkeypatch.setattr(ffn, "_build", slow)
        earlier = asyncio.ensure_future(ffn.load(FFNShard((0, 1)), 2))
        await asyncio.to_thread(begun.wait, TIMEOUT_S)
        await ffn.load(FFNShard((2, 3)), 3)
        may_end.set()
        with pytest.raises(Stale, match="load for epoch 2 comes too late, it gets ready for 3"):
            await earlier
        assert ffn._half_for(FFNShard((2, 3))) is not None


async def test_weights_that_a_later_epoch_takes_on_are_not_dropped_with_the_earlier_one(config: Config) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (ffn,) = made.ffn
        shard = FFNShard((2, 3))
        await ffn.load(shard, 2)
        assert (await ffn.load(shard, 3))["moved_experts"] == 0
        await ffn.discard(2)
        assert ffn._half_for(shard) is not None
        await ffn.discard(3)
        assert ffn._half_for(shard) is None


async def test_a_standby_place_whose_links_break_is_told_of_while_the_old_epoch_serves_on(
    config: Config, expected: list[int]
) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,), (ffn,) = made.attention, made.ffn
        attention.submit("r")
        await made.stand_by(Epoch(2, 1, 1, 1, 2))
        ffn._places[2].group.mesh.close()
        async with asyncio.timeout(TIMEOUT_S):
            assert "edge to rank 1" in await attention.lost(2)
        assert await attention.tokens("r") == expected
        await asyncio.gather(*(m.discard(2) for m in made.members))
        await made.form(Epoch(3, 1, 1, 1, 2))
        attention.submit("s")
        assert await attention.tokens("s") == expected


async def test_a_standby_place_that_broke_is_entered_without_a_link_and_left_for_a_later_one(
    config: Config, expected: list[int]
) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,), (ffn,) = made.attention, made.ffn
        await made.stand_by(Epoch(2, 1, 1, 1, 2))
        ffn._places[2].group.mesh.close()
        async with asyncio.timeout(TIMEOUT_S):
            await attention.lost(2)
        await attention.switch(2)
        attention.submit("r")
        assert await attention.beat() == 2
        await made.form(Epoch(3, 1, 1, 1, 2))
        assert await attention.tokens("r") == expected


async def test_a_step_loop_that_fails_is_told_and_takes_no_other_epoch(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with roster(config, Epoch(1, 1, 1, 1, 2)) as made:
        (attention,), (ffn,) = made.attention, made.ffn

        def fail(*args: object) -> None:
            raise ArithmeticError("planted")

        monkeypatch.setattr(attention._ready_loop().half, "rotary", fail)
        with caplog.at_level(logging.CRITICAL):
            attention.submit("r")
            async with asyncio.timeout(TIMEOUT_S):
                assert await attention.lost(1) == "ArithmeticError: planted"
                assert "edge to rank 0" in await ffn.lost(1)
        with pytest.raises(RuntimeError, match="the step loop is over: ArithmeticError"):
            await attention.prepare(Epoch(2, 1, 1, 1, 2), 0, "afd-test-e2", 0.0)
