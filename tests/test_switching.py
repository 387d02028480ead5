"""Step loops from epoch to epoch: drained, or interrupted anywhere, every request gets the tokens of an undisturbed run."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.kv_cache import check_integrity
from afd_ray.engine.local import LocalCluster, ring_group
from afd_ray.engine.loop import Wire
from afd_ray.handoff.loopback import loopback_group
from afd_ray.handoff.mesh import LinkError, LinkKind, Mesh
from afd_ray.handoff.message import Header, Message
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import AttentionHalf
from afd_ray.request import Request, SamplingParams, TokenOutput

TIMEOUT_S = 30.0
MAX_TOKENS = 16
CHUNK = 48
MESSAGES = 50
"""Every rank has had so many twice over before the requests end."""
Tokens = dict[str, list[int | None]]


@pytest.fixture(scope="module")
def checkpoint(tiny_directory: Path) -> Checkpoint:
    return Checkpoint.open(tiny_directory)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Half of them greedy, half drawn with a seed and penalties, which depend on all tokens so far."""
    rng = random.Random(1)
    vocab = PRESETS["step3-tiny"].vocab_size
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    drawn = [
        SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, top_p=0.9, seed=i, frequency_penalty=0.5, ignore_eos=True)
        for i in range(5)
    ]
    params = [greedy] * 5 + drawn
    return [Request(f"r{i}", tuple(rng.choices(range(vocab), k=rng.randint(1, 150))), each) for i, each in enumerate(params)]


class Run:
    """A cluster, what it has put out so far, and which loops have told of a loss."""

    def __init__(self, half: AttentionHalf, checkpoint: Checkpoint, epoch: Epoch, meshes: Sequence[Mesh] | None = None) -> None:
        self.changed = threading.Condition()
        self.losses: list[int] = []
        self.tokens: Tokens = {}
        self.unfinished: set[str] = set()
        self.local = LocalCluster(
            half,
            lambda shard: load_ffn(checkpoint, shard),
            epoch,
            num_blocks=120,
            max_tokens_per_micro_batch=CHUNK,
            meshes=meshes or loopback_group(epoch.world_size, epoch.number, poison=True),
            on_lost=self.lose,
        )

    def lose(self, number: int, reason: str) -> None:
        with self.changed:
            self.losses.append(number)
            self.changed.notify_all()

    def await_loss(self, epoch: Epoch) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.losses.count(epoch.number) == epoch.world_size, TIMEOUT_S)

    def submit(self, requests: list[Request]) -> None:
        for i, request in enumerate(requests):
            self.tokens[request.id] = []
            self.unfinished.add(request.id)
            self.local.attention[i % len(self.local.attention)].submit(request).result(TIMEOUT_S)

    def take(self, until: Callable[[], bool]) -> None:
        while not until():
            for output in self.local._next(TIMEOUT_S):
                self.note(output)

    def note(self, output: TokenOutput) -> None:
        assert output.error is None
        self.tokens[output.request_id].append(output.token_id)
        if output.finish_reason is not None:
            self.unfinished.remove(output.request_id)

    def take_some(self, count: int) -> None:
        self.take(lambda: sum(map(len, self.tokens.values())) >= count or not self.unfinished)

    def finish(self) -> Tokens:
        self.take(lambda: not self.unfinished)
        for loop in self.local.attention:
            assert findings(loop) == []
            assert loop.call(lambda scheduler=loop.scheduler: scheduler.kv_used).result(TIMEOUT_S) == 0
        return self.tokens


def findings(loop: AttentionLoop) -> list[str]:
    scheduler = loop.scheduler
    return loop.call(lambda: check_integrity(scheduler.allocator, scheduler.sequences)).result(TIMEOUT_S)


@pytest.fixture(scope="module")
def half(checkpoint: Checkpoint) -> AttentionHalf:
    return load_attention(checkpoint)


@pytest.fixture(scope="module")
def expected(half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request]) -> Tokens:
    run = Run(half, checkpoint, Epoch(1, 1, 1, 1, 1))
    with run.local:
        run.submit(requests)
        return run.finish()


# --- at a step boundary -----------------------------------------------------------------------------------------------------

WAY = [
    Epoch(2, 1, 2, 1, 3),
    Epoch(3, 3, 1, 2, 2, dispatch="routed"),
    Epoch(4, 2, 2, 2, 4, adaptive=True),
    Epoch(5, 1, 1, 3, 1),
    Epoch(6, 1, 1, 1, 2),
]


@contextmanager
def meshes_for(kinds: Sequence[LinkKind]) -> Iterator[Callable[[Epoch], list[Mesh]]]:
    """Real links, or loopback without kinds; those of all epochs stay open until the end, unless they are closed."""
    with ExitStack() as stack:

        def made(epoch: Epoch) -> list[Mesh]:
            if not kinds:
                return loopback_group(epoch.world_size, epoch.number, poison=True)
            config = PRESETS["step3-tiny"]
            return list(stack.enter_context(ring_group(epoch, config, config.dtype, CHUNK, kinds)))

        yield made


@pytest.mark.parametrize("kinds", [(), ("shm",), ("tcp",), ("auto", "tcp")], ids=lambda kinds: "-".join(kinds) or "loopback")
def test_no_token_changes_when_every_epoch_is_drained(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens, kinds: Sequence[LinkKind]
) -> None:
    first = Epoch(1, 1, 1, 1, 1)
    with meshes_for(kinds) as meshes:
        run = Run(half, checkpoint, first, meshes(first))
        with run.local:
            run.submit(requests)
            for epoch in WAY:
                run.take_some(20 * (epoch.number - 1))
                pauses = run.local.change(epoch, meshes(epoch))
                assert len(pauses) == epoch.attention
            assert run.finish() == expected
    assert run.losses == []


def test_a_colocated_cluster_changes_its_shape_too(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens
) -> None:
    run = Run(half, checkpoint, Epoch(1, 1, 1, 0, 1))
    with run.local:
        run.submit(requests)
        for number, (attention, slots, drain) in enumerate([(3, 2, True), (2, 1, False), (1, 3, False)], start=2):
            run.take_some(30 * (number - 1))
            run.local.change(Epoch(number, attention, 1, 0, slots), drain=drain)
        assert run.finish() == expected


def test_nothing_is_in_flight_at_the_boundary_and_no_wave_waits_for_a_rank_that_drains(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens
) -> None:
    run = Run(half, checkpoint, Epoch(1, 2, 1, 1, 2))
    with run.local:
        run.submit(requests)
        drained, going_on = run.local.attention
        drained.drain().result(TIMEOUT_S)
        assert drained.draining
        assert drained.scheduler.in_flight == 0
        theirs = {request.id for request in requests[1::2]}
        run.take(lambda: not run.unfinished & theirs)
        assert drained.scheduler.in_flight == 0
        drained.resume().result(TIMEOUT_S)
        assert run.finish() == expected
    assert going_on.pause_ms is not None


def test_a_drain_that_is_called_off_says_so(half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request]) -> None:
    run = Run(half, checkpoint, Epoch(1, 1, 1, 1, 1))
    with run.local:
        run.submit(requests[:1])
        (loop,) = run.local.attention

        reached: Future[None] = Future()
        loop.call(lambda: (loop._drain(reached), loop._resume())).result(TIMEOUT_S)
        with pytest.raises(RuntimeError, match="resumed before the step boundary"):
            reached.result(TIMEOUT_S)
        run.finish()


# --- anywhere ---------------------------------------------------------------------------------------------------------------


class Faulty:
    """A mesh that passes on so many messages, and then does as `fault` says."""

    def __init__(self, mesh: Mesh, count: int, fault: Callable[["Faulty"], None]) -> None:
        self.inner, self.left, self.fault = mesh, count, fault
        self.rank, self.world_size, self.epoch, self.device = mesh.rank, mesh.world_size, mesh.epoch, mesh.device
        self.clock, self.silent = mesh.clock, False

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        self.count()
        if not self.silent:
            self.inner.send(peer, header, tensors)

    def receive(self) -> Message | None:
        message = self.inner.receive()
        if message is not None:
            self.count()
        return None if self.silent else message

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.fault(self)

    def settle(self) -> None:
        self.inner.settle()

    def wait(self, timeout_s: float | None, under_way: bool = False) -> None:
        self.inner.wait(timeout_s, under_way)

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


def cut(mesh: Faulty) -> None:
    mesh.inner.close()
    raise LinkError(mesh.rank, "planted")


class Interruptions:
    """What was in flight at attention ranks when it was taken back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: set[int] = set()
        self.mid_prefill = self.decoding = 0
        original = AttentionLoop._take_back

        def watched(loop: AttentionLoop) -> None:
            for flight in filter(None, loop._flights):
                self.layers.add(flight.layer)
                self.mid_prefill += any(not chunk.samples or chunk.start for chunk in flight.batch.chunks if chunk.count > 1)
                self.decoding += any(chunk.count == 1 for chunk in flight.batch.chunks)
            original(loop)

        monkeypatch.setattr(AttentionLoop, "_take_back", watched)


def interrupted_twice(run: Run, meshes: Callable[[Epoch], list[Mesh]], requests: list[Request], rng: random.Random) -> Tokens:
    """Links are cut in two epochs one after the other, each time at some rank's n-th message; the third epoch ends it."""
    run.submit(requests)
    for number in (2, 3):
        run.await_loss(run.local.epoch)
        for loop in run.local.attention:
            assert loop.scheduler.in_flight == 0
            assert findings(loop) == []
        epoch = Epoch(number, rng.choice((1, 2)), *rng.choice(((1, 1), (2, 1), (1, 2))), rng.randint(1, 3))
        fresh = meshes(epoch)
        if number == 2:
            plant(fresh, epoch, rng)
        run.local.change(epoch, fresh, drain=False)
    return run.finish()


def plant(meshes: list[Mesh], epoch: Epoch, rng: random.Random) -> None:
    """At a rank that has messages: the first attention rank has requests in every epoch."""
    rank = rng.choice((0, *epoch.ffn_ranks))
    meshes[rank] = Faulty(meshes[rank], rng.randint(1, MESSAGES), cut)


def check_interrupted(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens, kinds: Sequence[LinkKind], seed: int
) -> None:
    rng = random.Random(seed)
    first = Epoch(1, rng.choice((1, 2)), 1, 1, rng.randint(1, 3))
    with meshes_for(kinds) as meshes:
        begun = meshes(first)
        plant(begun, first, rng)
        run = Run(half, checkpoint, first, begun)
        with run.local:
            assert interrupted_twice(run, meshes, requests, rng) == expected, f"seed {seed}"


def test_a_cut_anywhere_changes_no_token(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Interruptions(monkeypatch)
    for seed in range(8):
        check_interrupted(half, checkpoint, requests, expected, (), seed)
    assert len(seen.layers) > 2
    assert seen.mid_prefill
    assert seen.decoding


@pytest.mark.parametrize("kinds", [("shm",), ("tcp",)], ids=lambda kinds: "-".join(kinds))
def test_a_cut_anywhere_changes_no_token_over_real_links(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens, kinds: Sequence[LinkKind]
) -> None:
    for seed in range(100, 102):
        check_interrupted(half, checkpoint, requests, expected, kinds, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(200, 300))
def test_a_cut_anywhere_changes_no_token_in_many_runs(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens, seed: int
) -> None:
    check_interrupted(half, checkpoint, requests, expected, random.Random(seed).choice([(), ("shm",), ("tcp",)]), seed)


@pytest.mark.parametrize("silent_rank", [0, 1])
def test_a_member_that_falls_silent_is_left_behind_in_the_middle_of_a_layer(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens, silent_rank: int
) -> None:
    """No link breaks: the others are told to go on elsewhere while they wait for it."""
    fell = threading.Event()

    def fall_silent(mesh: Faulty) -> None:
        mesh.silent = True
        fell.set()

    epoch = Epoch(1, 1, 1, 1, 2)
    meshes = loopback_group(epoch.world_size, 1, poison=True)
    meshes[silent_rank] = Faulty(meshes[silent_rank], 77, fall_silent)
    run = Run(half, checkpoint, epoch, meshes)
    with run.local:
        run.submit(requests)
        assert fell.wait(TIMEOUT_S)
        run.local.change(Epoch(2, 1, 1, 2, 3), drain=False)
        assert run.finish() == expected
    assert run.losses == []


def test_told_to_switch_at_the_end_of_a_micro_batch_it_begins_none_in_the_old_epoch(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, epoch = Run(half, checkpoint, Epoch(1, 1, 1, 1, 3)), Epoch(2, 1, 1, 1, 1)
    with run.local:
        (loop,), (ffn,) = run.local.attention, run.local.ffn
        publish, meshes = loop._publish, loopback_group(2, 2, poison=True)

        def switch_at(outputs: list[TokenOutput]) -> None:
            publish(outputs)
            if loop.wire.epoch.number == 1 and loop._flights[0] is not None:  # so another slot has just ended
                loop.switch(Wire(meshes[0], epoch, 0, checkpoint.config.dtype))
                ffn.switch(Wire(meshes[1], epoch, 1, checkpoint.config.dtype))

        monkeypatch.setattr(loop, "_publish", switch_at)
        run.submit(requests)
        assert run.finish() == expected
        assert loop.epoch_number == 2


def test_an_unlinked_loop_takes_requests_and_aborts(
    half: AttentionHalf, checkpoint: Checkpoint, requests: list[Request], expected: Tokens
) -> None:
    epoch = Epoch(1, 1, 1, 1, 2)
    meshes = loopback_group(epoch.world_size, 1)
    meshes[0] = Faulty(meshes[0], 100, cut)
    run = Run(half, checkpoint, epoch, meshes)
    with run.local:
        (loop,) = run.local.attention
        endless = Request("endless", (1, 2, 3), SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True))
        run.tokens["endless"] = []
        loop.submit(endless).result(TIMEOUT_S)
        run.submit(requests[:4])
        run.await_loss(epoch)
        assert loop.epoch_number is None
        with pytest.raises(RuntimeError, match="no epoch to drain"):
            loop.drain().result(TIMEOUT_S)
        loop.abort("endless").result(TIMEOUT_S)
        assert all(sequence.id != "endless" for sequence in loop.scheduler.sequences)
        run.submit(requests[4:6])
        run.local.change(Epoch(2, 1, 1, 1, 2), drain=False)
        tokens = run.finish()
        del tokens["endless"]
        assert tokens == {request.id: expected[request.id] for request in requests[:6]}
        assert loop.pause_ms


def test_commands_for_a_loop_that_is_over_are_refused(half: AttentionHalf, checkpoint: Checkpoint) -> None:
    epoch = Epoch(1, 1, 1, 1, 1)
    run = Run(half, checkpoint, epoch)
    with run.local:
        (loop,) = run.local.attention
        wire = Wire(loopback_group(2, 2)[0], Epoch(2, 1, 1, 1, 1), 0, checkpoint.config.dtype)
    queued = loop.switch(wire)
    loop.abandon()
    for future in (queued, loop.drain(), loop.switch(wire)):
        with pytest.raises(RuntimeError, match="the step loop is over"):
            future.result(TIMEOUT_S)
