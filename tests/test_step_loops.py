"""The step loops over the loopback mesh: token for token the one-process reference, and planted faults are caught."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from afd_ray.engine.attention import AttentionLoop
from afd_ray.engine.ffn import FFNLoop
from afd_ray.engine.flight import Flight
from afd_ray.engine.kv_cache import check_integrity
from afd_ray.engine.local import LocalCluster, ring_group
from afd_ray.engine.loop import Wire
from afd_ray.engine.waves import Wave
from afd_ray.handoff.loopback import LoopbackMesh, loopback_group
from afd_ray.handoff.mesh import LinkKind, Mesh
from afd_ray.handoff.message import HEADER_BYTES, Header, Kind, Message
from afd_ray.handoff.rows import QUANTISED
from afd_ray.membership.epoch import DISPATCHES, Dispatch, Epoch
from afd_ray.membership.experts import place_experts
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn, load_model, write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.step3 import FFNHalf, FFNShard, Routed, Slice
from afd_ray.request import Request, SamplingParams

MAX_TOKENS = 24
CHUNK = 48
LOADS = (9.0, 1.0, 1.0, 5.0, 1.0, 7.0, 1.0, 2.0)


def shape(
    attention: int, tensor: int, expert: int, micro_batches: int, dispatch: Dispatch = "broadcast", redundant: int = 0
) -> Epoch:
    experts = place_experts(LOADS, expert, redundant) if redundant else ()
    return Epoch(1, attention, tensor, expert, micro_batches, dispatch=dispatch, experts=experts)


def name(epoch: Epoch) -> str:
    copies = sum(map(len, epoch.experts))
    shape = f"{epoch.attention}A-tp{epoch.tensor_parallel}-ep{epoch.expert_parallel}-m{epoch.micro_batches}"
    return f"{shape}-{epoch.dispatch}" + (f"-{copies}-copies" if copies else "")


# Each count of each kind of rank, each number of micro-batches, each dispatch, with and without copies of experts; in `full` all of them.
COVER = [
    shape(1, 1, 1, 1),
    shape(3, 1, 1, 3, "routed"),
    shape(1, 2, 1, 4),
    shape(1, 1, 2, 3),
    shape(3, 2, 2, 3, "routed", redundant=3),
    shape(2, 1, 4, 4, "routed", redundant=1),
    shape(1, 1, 4, 2, "broadcast", redundant=24),
]
GRID = [
    shape(attention, tensor, expert, micro_batches, dispatch, redundant)
    for attention, tensor, expert, micro_batches in product((1, 3), (1, 2, 3), (2, 3), (1, 3))
    for dispatch, redundant in product(DISPATCHES, (0, 3))
]


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
    wire_dtype: torch.dtype | None = None,
    meshes: Sequence[Mesh] | None = None,
) -> LocalCluster:
    return LocalCluster(
        load_attention(checkpoint, shared=epoch.shared_at_attention),
        load or (lambda shard: load_ffn(checkpoint, shard)),
        epoch,
        num_blocks=num_blocks,
        max_tokens_per_micro_batch=CHUNK,
        wire_dtype=wire_dtype,
        meshes=meshes or loopback_group(epoch.world_size, epoch.number, poison=True),
    )


def mismatches(local: LocalCluster, requests: list[Request], expected: dict[str, list[int]]) -> list[str]:
    """Ids of the requests whose tokens differ from the reference's."""
    outputs = local.generate(requests)
    return [request.id for request in requests if [o.token_id for o in outputs[request.id]] != expected[request.id]]


def check_equal(checkpoint: Checkpoint, epoch: Epoch, requests: list[Request], expected: dict[str, list[int]]) -> None:
    with cluster(checkpoint, epoch) as local:
        assert mismatches(local, requests, expected) == []
        for loop in local.attention:
            assert loop.scheduler.kv_used == 0
            assert check_integrity(loop.scheduler.allocator, loop.scheduler.sequences) == []


@pytest.mark.parametrize("epoch", COVER, ids=name)
def test_equal_to_the_reference(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]], epoch: Epoch
) -> None:
    check_equal(checkpoint, epoch, requests, expected)


@pytest.mark.parametrize("epoch", [shape(2, 2, 1, 2), shape(2, 1, 2, 3, "routed", redundant=3)], ids=name)
def test_equal_to_the_reference_when_attention_ranks_compute_the_shared_expert(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]], epoch: Epoch
) -> None:
    check_equal(checkpoint, replace(epoch, shared_at_attention=True), requests, expected)


def test_an_epoch_that_has_shared_experts_elsewhere_is_not_entered(checkpoint: Checkpoint) -> None:
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 1)) as local:
        loop = local.attention[0]
        local.stop()
    epoch = Epoch(2, 1, 1, 1, 1, shared_at_attention=True)
    with pytest.raises(RuntimeError, match="shared experts must be where the epoch says"):
        loop._enter(Wire(loopback_group(2, 2)[0], epoch, 0, torch.float32))


@pytest.mark.full
@pytest.mark.parametrize("epoch", GRID, ids=name)
def test_equal_to_the_reference_in_the_full_grid(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]], epoch: Epoch
) -> None:
    check_equal(checkpoint, epoch, requests, expected)


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


def first_logprobs(
    checkpoint: Checkpoint, requests: list[Request], epoch: Epoch, wire_dtype: torch.dtype
) -> list[dict[int, float]]:
    """The likeliest first tokens of every request."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    with cluster(checkpoint, epoch, wire_dtype=wire_dtype) as local:
        outputs = local.generate([replace(request, params=params) for request in requests])
    return [dict(outputs[request.id][0].top_logprobs) for request in requests]


@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 2)])
def test_an_8_bit_wire_stays_near_a_16_bit_one(checkpoint: Checkpoint, requests: list[Request], tensor: int, expert: int) -> None:
    epoch = Epoch(1, 1, tensor, expert, 2)
    sixteen = first_logprobs(checkpoint, requests, epoch, torch.bfloat16)
    eight = first_logprobs(checkpoint, requests, epoch, QUANTISED)
    same = [max(a, key=a.__getitem__) == max(b, key=b.__getitem__) for a, b in zip(sixteen, eight, strict=True)]
    errors = [abs(a[token] - b[token]) for a, b in zip(sixteen, eight, strict=True) for token in a.keys() & b.keys()]
    assert sum(errors) / len(errors) < 0.05
    assert max(errors) < 0.4
    assert sum(same) >= 0.8 * len(same)


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


@pytest.mark.parametrize(
    ("epoch", "kinds"),
    [
        pytest.param(shape(2, 1, 2, 4), ["auto"], marks=pytest.mark.full),
        (shape(2, 2, 1, 4), ["tcp"]),
        (shape(1, 1, 2, 2, "routed"), ["gloo"]),
        (shape(2, 2, 2, 2, "routed"), ["auto", "tcp"]),
        (shape(1, 1, 3, 3, "routed", redundant=3), ["auto", "tcp"]),
    ],
    ids=str,
)
def test_equal_to_the_reference_over_links_with_buffers_of_the_configured_size(
    checkpoint: Checkpoint, requests: list[Request], expected: dict[str, list[int]], epoch: Epoch, kinds: list[LinkKind]
) -> None:
    with ring_group(epoch, checkpoint.config, torch.float32, CHUNK, kinds) as meshes:
        assert {kind for mesh in meshes for kind in mesh.edge_kinds().values()} == {
            "shm" if kind == "auto" else kind for kind in kinds
        }
        with cluster(checkpoint, epoch, meshes=meshes) as local:
            assert mismatches(local, requests, expected) == []


class Ways(NamedTuple):
    """What an attention rank sent for one layer."""

    rows: int
    experts: list[list[int]] | None


def recorded_ways(monkeypatch: pytest.MonkeyPatch, loop: AttentionLoop) -> list[Ways]:
    """Grows as the loop sends rows."""
    ways: list[Ways] = []
    dispatch = loop._dispatch

    def recording(slot: int, flight: Flight, routed: Routed) -> None:
        ways.append(Ways(len(routed.hidden), None if routed.experts is None else routed.experts.tolist()))
        dispatch(slot, flight, routed)

    monkeypatch.setattr(loop, "_dispatch", recording)
    return ways


def message_bytes(*tensor_bytes: int) -> int:
    return HEADER_BYTES + sum(-(-size // 64) * 64 for size in tensor_bytes)


@pytest.mark.parametrize(
    ("wire_dtype", "row_bytes", "partial_bytes"),
    [(torch.float32, (256,), 256), (torch.bfloat16, (128,), 128), (QUANTISED, (64, 1), 128)],
    ids=str,
)
@pytest.mark.parametrize(("attention", "tensor"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.full)])
def test_routed_rows_cross_only_where_an_expert_of_theirs_is(
    checkpoint: Checkpoint,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    wire_dtype: torch.dtype,
    row_bytes: tuple[int, ...],
    partial_bytes: int,
    attention: int,
    tensor: int,
) -> None:
    """To the byte: what the recorded choice of experts asks for is what the links have carried."""
    epoch, instances = Epoch(1, attention, tensor, 4, 2, dispatch="routed"), range(4)
    with (
        ring_group(epoch, checkpoint.config, wire_dtype, CHUNK) as meshes,
        cluster(checkpoint, epoch, wire_dtype=wire_dtype, meshes=meshes) as local,
    ):
        before = [mesh.edge_counts() for mesh in meshes]
        ways = [recorded_ways(monkeypatch, loop) for loop in local.attention]
        local.generate(requests[:6])
        local.stop()
        after = [mesh.edge_counts() for mesh in meshes]
    for rank, instance, tp_rank in product(range(attention), instances, range(tensor)):
        sent = returned = 0
        for way in ways[rank]:
            visiting = [
                n
                for n in range(way.rows)
                if (n % 4 == instance if way.experts is None else instance in {e // 2 for e in way.experts[n]})
            ]
            choice = (3, 3 * 4) if way.experts is not None else ()
            sent += message_bytes(*(len(visiting) * size for size in (*row_bytes, *choice)))
            if visiting and tp_rank == rank % tensor:
                returned += message_bytes(len(visiting) * partial_bytes)
        peer = epoch.ffn_rank(instance, tp_rank)
        edge, warm = after[rank][peer], before[rank][peer]
        control = edge.sent_messages - warm.sent_messages - len(ways[rank])
        assert control == 0 or peer == epoch.conductor
        assert edge.sent_bytes - warm.sent_bytes == sent + control * HEADER_BYTES
        assert edge.received_bytes - warm.received_bytes == returned


def test_an_instance_that_no_row_goes_to_follows_at_its_own_pace(checkpoint: Checkpoint) -> None:
    """The others may be waves ahead of it: nothing that comes early is lost or refused."""
    epoch, layers = Epoch(1, 1, 1, 2, 1, dispatch="routed"), checkpoint.config.num_hidden_layers
    attention, conductor, ffn = loopback_group(epoch.world_size, 1)
    loop = FFNLoop(load_ffn(checkpoint, epoch.shard(2, checkpoint.config)))
    loop._wire = Wire(ffn, epoch, 2, torch.float32)
    loop._enter(loop.wire)
    for step, layer in product((1, 2), range(layers)):
        attention.send(2, Header(Kind.DISPATCH, 1, 0, layer=layer, step=step))
    attention.send(2, Header(Kind.DISPATCH, 1, 0, layer=0, step=3, rows=3), (torch.zeros(3, checkpoint.config.hidden_size),))
    for step in (1, 2, 3):
        conductor.send(2, Header(Kind.WAVE, 1, 1, step=step), (torch.tensor([3], dtype=torch.int32),))
    assert loop._receive()
    stages = sum(loop._run_stage() for _ in range(3 * layers))
    assert stages == 2 * layers + 1
    answer = attention.receive()
    assert answer is not None
    assert (answer.header.kind, answer.header.layer, answer.header.rows) == (Kind.PARTIAL, 0, 3)
    assert attention.receive() is None


def test_an_attention_rank_counts_how_often_each_expert_was_chosen(
    checkpoint: Checkpoint, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 2)) as local:
        loop = local.attention[0]
        ways = recorded_ways(monkeypatch, loop)
        local.generate(requests[:3])
        local.stop()
    chosen = Counter(expert for way in ways for row in way.experts or [] for expert in row)
    assert loop.expert_loads.tolist() == [chosen[expert] for expert in range(8)]


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
        loop.drain().result(10)  # what was aborted in flight is freed when that ends
        assert loop.scheduler.kv_used == 0


def test_a_loop_that_has_failed_answers_at_once(checkpoint: Checkpoint) -> None:
    def fail() -> bool:
        raise OSError("out of order")

    with cluster(checkpoint, Epoch(1, 1, 1, 1, 1)) as local:
        local.ffn[0]._run_stage = fail  # type: ignore[method-assign]
        local.ffn[0].call(lambda: None)
        with pytest.raises(RuntimeError, match="out of order"):
            local.collect(["never"], 10)
        with pytest.raises(RuntimeError, match="the step loop is over"):
            local.ffn[0].call(lambda: None).result(10)


def test_a_request_that_never_fits_is_refused_in_one_line(checkpoint: Checkpoint) -> None:
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 1), num_blocks=2) as local, pytest.raises(ValueError, match="room for a token"):
        local.attention[0].submit(Request("long", (1,) * 40)).result(10)


def test_flights_tell_every_layer_and_how_far_it_is_from_the_one_before(checkpoint: Checkpoint) -> None:
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 2)) as local:
        local.generate([Request("one", (1, 2, 3), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))])
        prompt_and_one = local.attention[0].flights
        local.generate([Request("more", (1, 2, 3), SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))])
        more = local.attention[0].flights.minus(prompt_and_one)
    layers = local.attention[0].half.config.num_hidden_layers
    assert (prompt_and_one.count, prompt_and_one.attention_compared_us) == (2, 0.0), "three rows, then one"
    assert (len(more.attention_by_layer_us), len(more.ffn_by_layer_us)) == (layers + 1, layers)
    assert 0 < more.attention_compared_us < 2 * sum(more.attention_by_layer_us)
    assert 0 < more.ffn_compared_us < 2 * sum(more.ffn_by_layer_us)
    assert 0 < more.attention_spread < 1


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
