"""The step loops over the loopback mesh: token for token the one-process reference, and planted faults are caught."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afd_ray.engine.ffn import FFNLoop
from afd_ray.engine.kv_cache import check_integrity
from afd_ray.engine.local import LocalCluster
from afd_ray.engine.loop import Wire
from afd_ray.engine.waves import Wave
from afd_ray.handoff.capacity import inbound_bytes
from afd_ray.handoff.loopback import LoopbackMesh, loopback_group
from afd_ray.handoff.mesh import Mesh, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind, Message
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn, load_model, write_checkpoint
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.step3 import FFNHalf, FFNShard, Routed, Slice
from afd_ray.request import Request, SamplingParams

MAX_TOKENS = 24
CHUNK = 48
# Pairs of (attention, TP, EP) and micro-batches, each value of each at least once.
COVER = [(1, 1, 1, 1), (2, 1, 1, 2), (3, 1, 1, 3), (1, 2, 1, 4), (1, 1, 2, 3), (3, 1, 2, 1), (2, 2, 2, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, PRESETS["step3-tiny"], random_tensors(PRESETS["step3-tiny"], seed=0))
    return Checkpoint.open(directory)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(1)
    vocab = PRESETS["step3-tiny"].vocab_size
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    return [Request(f"r{i}", tuple(rng.choices(range(vocab), k=rng.randint(1, 150))), params) for i in range(16)]


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, requests: list[Request]) -> dict[str, list[int]]:
    reference = load_model(checkpoint)
    return {request.id: reference.generate_greedy(request.prompt_token_ids, MAX_TOKENS) for request in requests}


def cluster(
    checkpoint: Checkpoint,
    epoch: Epoch,
    load: Callable[[FFNShard], FFNHalf] | None = None,
    *,
    num_blocks: int = 400,
    meshes: Sequence[Mesh] | None = None,
) -> LocalCluster:
    return LocalCluster(
        load_attention(checkpoint),
        load or (lambda shard: load_ffn(checkpoint, shard)),
        epoch,
        num_blocks=num_blocks,
        max_tokens_per_micro_batch=CHUNK,
        meshes=meshes or loopback_group(epoch.world_size, epoch.number, poison=True),
    )


def mismatches(local: LocalCluster, requests: list[Request], expected: dict[str, list[int]]) -> list[str]:
    """Ids of the requests whose tokens differ from the reference's."""
    outputs = local.generate(requests)
    return [request.id for request in requests if [o.token_id for o in outputs[request.id]] != expected[request.id]]


@pytest.mark.parametrize(("attention", "tensor", "expert", "micro_batches"), COVER)
def test_equal_to_the_reference(
    checkpoint: Checkpoint,
    requests: list[Request],
    expected: dict[str, list[int]],
    attention: int,
    tensor: int,
    expert: int,
    micro_batches: int,
) -> None:
    with cluster(checkpoint, Epoch(1, attention, tensor, expert, micro_batches)) as local:
        assert mismatches(local, requests, expected) == []
        for loop in local.attention:
            assert loop.scheduler.kv_used == 0
            assert check_integrity(loop.scheduler.allocator, loop.scheduler.sequences) == []


def test_a_rank_that_decides_how_many_slots_it_uses_equals_the_reference(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]]
) -> None:
    with cluster(checkpoint, Epoch(1, 2, 1, 1, 4, adaptive=True)) as local:
        assert mismatches(local, requests, expected) == []


def test_one_request_goes_through_one_slot(checkpoint: Checkpoint, requests: list[Request]) -> None:
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 4, adaptive=True)) as local:
        (loop,) = local.attention
        loop.recorder.start_trace()
        local.generate(requests[:1])
        assert {event.slot for event in loop.recorder.take_trace() if event.stage == "attention"} == {0}
        assert loop.scheduler.in_use == 1


def test_equal_to_the_reference_when_blocks_run_out(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]]
) -> None:
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 3), num_blocks=24) as local:
        assert mismatches(local, requests, expected) == []
        assert local.attention[0].scheduler.preemptions > 0


class Faulty(FFNHalf):
    """A shard that computes something slightly wrong."""

    fault: Callable[["Faulty", int, Routed, Tensor], Tensor]
    last: Tensor | None = None

    def forward(self, layer: int, routed: Routed) -> Tensor:
        return self.fault(layer, routed, super().forward(layer, routed))


def dropped_partial(half: Faulty, layer: int, routed: Routed, out: Tensor) -> Tensor:
    return torch.zeros_like(out) if layer == 2 and 7 in half.shard.experts else out


def stale_row(half: Faulty, layer: int, routed: Routed, out: Tensor) -> Tensor:
    last, half.last = half.last, out.clone()
    if layer == 1 and last is not None:
        out[0] = last[0]
    return out


def test_planted_faults_are_caught(checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]]) -> None:
    def with_fault(fault: Callable[[Faulty, int, Routed, Tensor], Tensor]) -> Callable[[FFNShard], FFNHalf]:
        def load(shard: FFNShard) -> FFNHalf:
            half = load_ffn(checkpoint, shard)
            half.__class__ = type("Planted", (Faulty,), {"fault": fault})
            return half

        return load

    def wrong_expert_weight(shard: FFNShard) -> FFNHalf:
        half = load_ffn(checkpoint, shard)
        with torch.no_grad():
            half.layers[1].moe.down_proj[0] = half.layers[1].moe.down_proj[1]
        return half

    def shared_expert_twice(shard: FFNShard) -> FFNHalf:
        return load_ffn(checkpoint, shard._replace(dense=Slice(0, 1)))

    loads = {
        "dropped partial": with_fault(dropped_partial),
        "stale row": with_fault(stale_row),
        "wrong expert weight": wrong_expert_weight,
        "shared expert counted twice": shared_expert_twice,
    }
    for fault, load in loads.items():
        with cluster(checkpoint, Epoch(1, 1, 1, 2, 2), load) as local:
            assert mismatches(local, requests, expected), f"a {fault} went unnoticed"


class Counting(LoopbackMesh):
    """Knows how many received messages are not released."""

    def __init__(self, mesh: LoopbackMesh) -> None:
        self.__dict__ = mesh.__dict__
        self.held = 0

    def receive(self) -> Message | None:
        message = super().receive()
        if message is None:
            return None
        self.held += 1

        def release() -> None:
            self.held -= 1
            message.release()

        return Message(message.header, message.tensors, release)


def test_rows_that_wait_for_another_rank_do_not_stay_in_their_edges_buffer(checkpoint: Checkpoint) -> None:
    """Else the slots that go on meanwhile fill the buffer behind them, and ranks that wait for each other stall."""
    epoch = Epoch(1, 2, 2, 1, 2)
    first, _, ffn, other = loopback_group(epoch.world_size, 1)
    mesh = Counting(ffn)
    loop = FFNLoop(load_ffn(checkpoint, epoch.shard(2, checkpoint.config)))
    loop._wire = Wire(mesh, epoch, 2, torch.float32)
    loop._enter(loop.wire)
    loop._begin(Wave(0, 1, (3, 5)))
    first.send(2, Header(Kind.DISPATCH, 1, 0, rows=3), (torch.zeros(3, checkpoint.config.hidden_size),))
    other.send(2, Header(Kind.REDUCE, 1, 3, rows=3), (torch.zeros(3, checkpoint.config.hidden_size),))
    assert loop._receive()
    assert not loop._run_stage(), "the other attention rank's rows are still missing"
    assert mesh.held == 0


def test_partials_that_wait_for_another_instance_do_not_stay_in_their_edges_buffer(checkpoint: Checkpoint) -> None:
    epoch = Epoch(1, 1, 1, 2, 1)
    attention, instance_0, _ = loopback_group(epoch.world_size, 1)
    with cluster(checkpoint, epoch) as local:
        loop = local.attention[0]
        local.stop()
    mesh = Counting(attention)
    loop._wire = Wire(mesh, epoch, 0, torch.float32)
    loop._enter(loop.wire)
    loop._submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=1, temperature=0.0)))
    assert loop._run_stage()
    instance_0.send(0, Header(Kind.PARTIAL, 1, 1, rows=3), (torch.zeros(3, checkpoint.config.hidden_size),))
    assert loop._receive()
    assert mesh.held == 0


@pytest.mark.parametrize(("attention", "tensor", "expert"), [(2, 1, 2), (2, 2, 1)])
def test_equal_to_the_reference_over_rings_of_the_configured_size(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]], attention: int, tensor: int, expert: int
) -> None:
    epoch = Epoch(1, attention, tensor, expert, 4)
    with connected(epoch, checkpoint.config) as meshes, cluster(checkpoint, epoch, meshes=meshes) as local:
        assert mismatches(local, requests, expected) == []


@contextmanager
def connected(epoch: Epoch, config: ModelConfig) -> Iterator[list[RingMesh]]:
    """Real meshes of one epoch, all in this process."""
    meshes = [
        open_mesh(
            rank,
            epoch.world_size,
            epoch.number,
            secret=b"test",
            host="127.0.0.1",
            peers={peer: inbound_bytes(epoch, rank, peer, config, torch.float32, CHUNK) for peer in epoch.peers(rank)},
            send_timeout_s=5.0,
        )
        for rank in range(epoch.world_size)
    ]
    try:
        endpoints = {mesh.rank: mesh.endpoint for mesh in meshes}
        with ThreadPoolExecutor(len(meshes)) as pool:
            list(pool.map(lambda mesh: mesh.connect(endpoints, 20.0), meshes))
            list(pool.map(lambda mesh: mesh.warm_up(20.0), meshes))
        yield meshes
    finally:
        for mesh in meshes:
            mesh.close()


def test_an_abort_frees_its_blocks_and_harms_nobody(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]]
) -> None:
    endless = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 2)) as local:
        loop = local.attention[0]
        loop.submit(Request("endless", (1, 2, 3), endless)).result(10)
        assert mismatches(local, requests, expected) == []
        loop.abort("endless").result(10)
        probe = Request("probe", (1, 2, 3), SamplingParams(max_tokens=1, temperature=0.0))
        local.generate([probe])
        assert loop.scheduler.kv_used == 0


def test_a_request_that_never_fits_is_refused_in_one_line(checkpoint: Checkpoint) -> None:
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 1), num_blocks=2) as local, pytest.raises(ValueError, match="room for a token"):
        local.attention[0].submit(Request("long", (1,) * 40)).result(10)


@pytest.mark.parametrize("broken", ["rotary", "complete", "publish"])
def test_a_loop_that_fails_anywhere_forgets_every_request(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("planted")

    with cluster(checkpoint, Epoch(1, 1, 1, 1, 2)) as local:
        loop = local.attention[0]
        owner = {"rotary": loop.half, "complete": loop.scheduler, "publish": loop}[broken]
        monkeypatch.setattr(owner, "_publish" if broken == "publish" else broken, fail)
        loop.submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=4, temperature=0.0)))
        with pytest.raises(RuntimeError, match="planted"):
            local.collect(["r"])
        loop.abandon()
        assert (loop.scheduler.running, loop.scheduler.waiting, loop.scheduler.kv_used) == (0, 0, 0)
