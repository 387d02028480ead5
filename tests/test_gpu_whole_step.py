"""Steps of a rank that computes both halves, all layers in one graph: what they give, and what is measured of them."""

from pathlib import Path

import pytest
import torch

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.gpu.memory import graph_bytes
from afd_ray.engine.gpu.passage import GPUPassage
from afd_ray.engine.gpu.whole_step import WholePassage
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.kernels.gpu.capture import Run, eagerly
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import FFNShard
from afd_ray.request import Request
from tests.gpu_cluster import CONFIG, HERE, cluster, expected, requests, served, written
from tests.triton_device import error, noise

NEEDS = Needs(rows=10, decoding=6, slots=2, instances=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    return written(directory)


class Rank:
    """Both halves, warmed up, and sequences that it has the keys and values of."""

    def __init__(self, checkpoint: Checkpoint, sequences: int) -> None:
        self.compute = GPUCompute(HERE, capture=lambda: eagerly)
        self.half = self.compute.attention(load_attention(checkpoint))
        self.ffn = self.compute.colocated_ffn(load_ffn(checkpoint, FFNShard.whole(CONFIG)))
        self.cache = self.compute.cache(CONFIG, num_blocks=16, block_size=2, dtype=CONFIG.dtype)
        self.cache.blocks.copy_(torch.randn(self.cache.blocks.shape, generator=noise(1)))
        self.compute.warm_up_attention(self.half, self.cache, NEEDS, self.ffn)
        self.chunks = []
        for index in range(sequences):
            sequence = Sequence(Request(str(index), (5, 7, 9 + index)))
            sequence.block_table = [2 * index, 2 * index + 1]
            self.chunks.append(Chunk(sequence, 2, 1, samples=index != 1))


def test_a_step_gives_what_its_layers_give_one_by_one(checkpoint: Checkpoint) -> None:
    """Five rows in a bucket of six, one of which chooses no token."""
    rank = Rank(checkpoint, 5)
    before = rank.cache.blocks.clone()
    whole = rank.compute.begin(rank.half, rank.cache, rank.chunks, slot=1)
    assert isinstance(whole, WholePassage)
    found, cached = whole.logits(), rank.cache.blocks[:, :16].clone()
    rank.cache.blocks.copy_(before)
    passage = GPUPassage(rank.half, rank.cache, rank.chunks)
    for layer in range(CONFIG.num_hidden_layers):
        passage.add(rank.ffn(layer, passage.attend(layer)))
    right = passage.logits()
    assert found.shape == right.shape == (4, CONFIG.vocab_size)
    assert error(found, right) < 1e-5
    assert error(cached, rank.cache.blocks[:, :16]) < 1e-5
    assert not torch.equal(cached, before[:, :16])


def test_a_slot_s_step_leaves_another_slot_s_alone(checkpoint: Checkpoint) -> None:
    rank = Rank(checkpoint, 2)
    alone = rank.compute.begin(rank.half, rank.cache, rank.chunks[:1], slot=0).logits()
    first = rank.compute.begin(rank.half, rank.cache, rank.chunks[:1], slot=0)
    rank.compute.begin(rank.half, rank.cache, rank.chunks[1:], slot=1)
    assert torch.equal(first.logits(), alone)


def test_prompts_and_more_rows_go_layer_by_layer(checkpoint: Checkpoint) -> None:
    rank = Rank(checkpoint, 7)
    prompt = Chunk(rank.chunks[0].sequence, 0, 3, samples=True)
    for chunks, slot, whole in (
        (rank.chunks[:6], 0, True),
        (rank.chunks, 0, False),
        ([prompt], 0, False),
        (rank.chunks[:1], 2, False),
    ):
        assert rank.compute.begin(rank.half, rank.cache, chunks, slot).whole == whole


def test_a_step_is_one_replay_and_its_time_is_dealt_to_its_layers(checkpoint: Checkpoint) -> None:
    replays = 0

    def counted(run: Run) -> Run:
        def replay() -> None:
            nonlocal replays
            replays += 1
            run()

        return replay

    asked = requests(prompts=(1, 1, 1), max_tokens=4)
    with cluster(checkpoint, Epoch(1, 1, 1, 0, 2), GPUCompute(HERE, capture=lambda: counted)) as local:
        assert served(local, asked) == expected(checkpoint, asked)
        loop = local.attention[0]
    by_layer_us = loop.flights.attention_by_layer_us
    assert replays == loop.flights.count == loop.recorder.runs("head") >= 4
    assert loop.recorder.runs("attention") == loop.recorder.runs("ffn") == 0
    assert len(by_layer_us) == CONFIG.num_hidden_layers
    assert by_layer_us[0] == pytest.approx(by_layer_us[-1]) == pytest.approx(loop.flights.attention_us)
    assert loop.flights.ffn_us == 0


def test_slots_take_turns(checkpoint: Checkpoint) -> None:
    order: list[str] = []
    with cluster(checkpoint, Epoch(1, 1, 1, 0, 2), GPUCompute(HERE, capture=lambda: eagerly)) as local:
        loop = local.attention[0]
        publish = loop._publish
        loop._publish = lambda outputs: (order.extend(output.request_id for output in outputs), publish(outputs))[1]
        served(local, requests(prompts=(1, 1), max_tokens=6))
    first = order.index("r1")
    assert len(order) == 12
    assert order[first : first + 8] == ["r1", "r0"] * 4


def test_graphs_of_whole_layers_take_more_room() -> None:
    config = PRESETS["step3"]
    needs = Needs(512, 64, 4, 1)
    assert graph_bytes(config, needs) < graph_bytes(config, needs._replace(instances=0)) < 4 << 30
