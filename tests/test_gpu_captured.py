"""Steps by graphs: on a GPU captured, elsewhere with the calls themselves for a graph, which is everything about them but the capture."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.captured import CapturedPassage
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.gpu.memory import graph_bytes
from afd_ray.engine.gpu.passage import GPUPassage
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.handoff.quantise import quantise
from afd_ray.kernels.gpu.capture import CUDAGraphs, Run, buckets
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import AttentionHalf, FFNShard, Narrow, Routed
from afd_ray.request import Request
from tests.gpu_cluster import CONFIG, E4M3, HERE, WIDE, cluster, expected, requests, served, written
from tests.specialisations import recorded
from tests.triton_device import COMPILED, error, noise

NEEDS = Needs(rows=10, decoding=6, slots=1, instances=2)


class Calls:
    """A `Capture` that counts, and has every replay launch what the first one did, but for where tensors lie that are made anew.

    Graphs do so by themselves.
    """

    def __init__(self) -> None:
        self.replays = 0
        self._graphs = CUDAGraphs(HERE) if COMPILED else None

    def __call__(self, run: Run) -> Run:
        if self._graphs is not None:
            run = self._graphs(run)
        first: list[Any] = []

        def replay() -> None:
            self.replays += 1
            launched = launches(run)
            first.extend([] if first else launched)
            assert launched == first

        return replay


class Listening(threading.local):
    """What this thread launches, while somebody wants to know."""

    launched: list[Any] | None = None


LISTENING = Listening()


@pytest.fixture(autouse=True)
def _listen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = InterpretedFunction.run

    def noted(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if LISTENING.launched is not None:
            values = [
                (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value
                for value in (*arguments, *named.values())
            ]
            LISTENING.launched.append((kernel.__name__, grid, values))
        return original(kernel, *arguments, grid=grid, warmup=warmup, **named)

    monkeypatch.setattr(InterpretedFunction, "run", noted)


def launches(run: Run) -> list[Any]:
    """Kernels, grids, numbers, and of tensors their dtypes and shapes, in order."""
    LISTENING.launched = found = []
    try:
        run()
    finally:
        LISTENING.launched = None
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    return written(directory)


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (2, (1, 2)), (20, (1, 2, 4, 8, 12, 16, 20)), (64, (1, 2, 4, 8, 12, 16, 24, 32, 48, 64))]
)
def test_buckets_end_with_the_most_rows_and_pad_by_a_third_at_most(most: int, sizes: tuple[int, ...]) -> None:
    assert buckets(most) == sizes
    assert all(low + 1 >= high * 2 / 3 for low, high in zip(buckets(4096)[3:], buckets(4096)[4:], strict=False))


class Broken:
    """A graph, and the stream it is captured on, of a device that forbids what is launched."""

    device = HERE

    def __init__(self, *arguments: object) -> None:
        self.ended = False

    def capture_begin(self, **how: object) -> None:
        pass

    def capture_end(self) -> None:
        self.ended = True
        raise RuntimeError("operation failed due to a previous error during capture")

    def wait_stream(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


def test_what_breaks_a_capture_is_told_and_the_capture_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, calls = Broken(), []
    for name, stand_in in {
        "Stream": Broken,
        "CUDAGraph": lambda: graph,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device: None,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def run() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CUDAGraphs(HERE)(run)
    assert graph.ended


@pytest.mark.parametrize(
    "epoch",
    [
        Epoch(1, 1, 1, 2, 2, dispatch="routed"),
        pytest.param(Epoch(1, 2, 1, 1, 3), marks=pytest.mark.full),
        pytest.param(Epoch(1, 1, 2, 1, 2, shared_at_attention=True), marks=pytest.mark.full),
        Epoch(1, 1, 1, 0, 2),
    ],
    ids=["routed", "broadcast", "shared at attention", "colocated"],
)
def test_tokens_are_the_reference_s(checkpoint: Checkpoint, epoch: Epoch) -> None:
    """And nothing is launched that the warm-up has not."""
    calls, asked = Calls(), requests(prompts=(1, 12, 5), max_tokens=3)
    compute = GPUCompute(HERE, capture=lambda: calls)
    with recorded() as warmed:
        local = cluster(checkpoint, epoch, compute)
    with recorded() as asked_for, local:
        found = served(local, asked)
    assert found == expected(checkpoint, asked)
    assert asked_for - warmed == set()
    assert calls.replays > 2 * (CONFIG.num_hidden_layers if epoch.ffn else 1)


@pytest.mark.parametrize("wire", [E4M3, pytest.param(None, marks=pytest.mark.full)], ids=str)
def test_so_it_is_in_e4m3(tmp_path: Path, wire: torch.dtype | None) -> None:
    """The same tokens as launched anew."""
    held, epoch = written(tmp_path, WIDE), Epoch(1, 1, 1, 1, 1)
    asked, calls, found = requests(prompts=(1, 2), max_tokens=2), Calls(), []
    for capture in (None, lambda: calls):
        narrow = dict.fromkeys(("quantise_experts", "quantise_dense", "quantise_projections"), True)
        compute = GPUCompute(HERE, **narrow, quantise_rows=wire is E4M3, capture=capture)
        with cluster(held, epoch, compute, cache_dtype=E4M3, wire_dtype=wire) as local:
            found.append(served(local, asked))
    assert found[0] == found[1]
    assert calls.replays


class Rank:
    """An attention rank that is warmed up, and sequences that it has the keys and values of."""

    def __init__(self, checkpoint: Checkpoint, sequences: int, capture: Callable[[], Calls] = Calls) -> None:
        self.compute = GPUCompute(HERE, capture=capture)
        self.half: AttentionHalf = self.compute.attention(load_attention(checkpoint))
        self.cache: PagedCache = self.compute.cache(CONFIG, num_blocks=16, block_size=2, dtype=CONFIG.dtype)
        self.cache.blocks.copy_(torch.randn(self.cache.blocks.shape, generator=noise(1)))
        self.compute.warm_up_attention(self.half, self.cache, NEEDS)
        self.sequences = []
        for index in range(sequences):
            sequence = Sequence(Request(str(index), (5, 7, 9 + index)))
            sequence.block_table = [2 * index, 2 * index + 1]
            self.sequences.append(sequence)

    def chunks(self, count: int = 1) -> list[Chunk]:
        """The last so many tokens of each."""
        return [Chunk(sequence, 3 - count, count, samples=True) for sequence in self.sequences]


def test_a_step_gives_what_it_gives_launched_anew_and_touches_nobody_s_blocks(checkpoint: Checkpoint) -> None:
    """Five rows in a bucket of six; layers' rows, logits and what is cached."""
    rank = Rank(checkpoint, 5)
    before = rank.cache.blocks.clone()
    results = []
    for passage in (
        rank.compute.begin(rank.half, rank.cache, rank.chunks(), slot=0),
        GPUPassage(rank.half, rank.cache, rank.chunks()),
    ):
        rank.cache.blocks.copy_(before)
        rows = []
        for layer in range(CONFIG.num_hidden_layers):
            routed = passage.to_host(passage.attend(layer))
            rows += [tensor.clone() for tensor in (routed.hidden, routed.experts, routed.weights) if tensor is not None]
            passage.add(torch.ones(5, CONFIG.hidden_size, device=HERE))
        results.append((rows, passage.logits(), rank.cache.blocks[:, :16].clone()))
    (rows, logits, cached), (other_rows, other_logits, other_cached) = results
    assert [tensor.dtype for tensor in rows] == [tensor.dtype for tensor in other_rows]
    assert all(error(ours.float(), theirs.float()) < 1e-5 for ours, theirs in zip(rows, other_rows, strict=True))
    assert error(logits, other_logits) < 1e-5
    assert error(cached, other_cached) < 1e-5
    assert (cached != before[:, :16]).flatten(2).any(2).sum() == 5 * CONFIG.num_hidden_layers


def test_prompts_and_more_rows_than_a_graph_has_and_other_slots_are_launched_anew(checkpoint: Checkpoint) -> None:
    rank = Rank(checkpoint, 7)

    def begun(chunks: list[Chunk], slot: int = 0) -> type:
        return type(rank.compute.begin(rank.half, rank.cache, chunks, slot))

    assert begun(rank.chunks()[:6]) is CapturedPassage
    assert begun(rank.chunks()) is GPUPassage
    assert begun([*rank.chunks()[:1], *rank.chunks(2)[1:2]]) is GPUPassage
    assert begun(rank.chunks()[:6], slot=1) is GPUPassage


def test_graphs_serve_fewer_slots_and_instances_and_are_captured_again_for_more(checkpoint: Checkpoint) -> None:
    sets: list[Calls] = []

    def capture() -> Calls:
        sets.append(Calls())
        return sets[-1]

    rank = Rank(checkpoint, 1, capture)
    for needs, made in ((NEEDS._replace(instances=1), 1), (NEEDS._replace(slots=2, instances=1), 2), (NEEDS, 2)):
        rank.compute.warm_up_attention(rank.half, rank.cache, needs)
        assert len(sets) == made
    passage = rank.compute.begin(rank.half, rank.cache, rank.chunks(), slot=1)
    assert isinstance(passage, CapturedPassage)


@pytest.mark.parametrize("narrow", [False, True])
def test_ffn_rows_are_padded_and_more_than_a_graph_has_are_launched_anew(tmp_path: Path, narrow: bool) -> None:
    held, calls = written(tmp_path, WIDE), Calls()
    plain, captured = GPUCompute(HERE), GPUCompute(HERE, capture=lambda: calls)
    shard = FFNShard((1, 2), first_id=2, at_home=True)
    halves = [compute.ffn(load_ffn(held, shard)) for compute in (plain, captured)]
    captured.warm_up_ffn(halves[1], rows=6, narrow=narrow)
    generator = noise(2)
    for count, replayed in ((5, True), (1, True), (3, True), (7, False)):
        hidden = torch.randn(count, WIDE.hidden_size, generator=generator)
        packed = Narrow(*quantise(hidden)) if narrow else None
        ids = torch.randint(1, 5, (count, 2), generator=generator, dtype=torch.uint8)
        routed = Routed(hidden if packed is None else packed.values, ids, torch.rand(count, 2, generator=generator), packed)
        before = calls.replays
        for layer, given in ((0, routed._replace(experts=None, weights=None)), (1, routed)):
            right, found = (half(layer, given) for half in halves)
            assert found.shape == right.shape
            assert error(found, right) < 1e-5
        assert calls.replays - before == 2 * replayed


def test_graphs_take_room_from_keys_and_values() -> None:
    config = PRESETS["step3"]
    few, many = (graph_bytes(config, Needs(512, rows, 4, 2)) for rows in (16, 256))
    assert 0 < few < many < 4 << 30
