"""The colocated loop: token for token the reference, alone in its epoch."""

import random
from pathlib import Path

import pytest

from afd_ray.engine.local import LocalCluster
from afd_ray.handoff.mesh import RingMesh, open_mesh
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn, load_model
from afd_ray.models.presets import PRESETS
from afd_ray.request import Request, SamplingParams

MAX_TOKENS = 16


@pytest.fixture(scope="module")
def checkpoint(tiny_directory: Path) -> Checkpoint:
    return Checkpoint.open(tiny_directory)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(1)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    vocab = PRESETS["step3-tiny"].vocab_size
    return [Request(f"r{i}", tuple(rng.choices(range(vocab), k=rng.randint(1, 100))), params) for i in range(8)]


def lone_meshes(epoch: Epoch) -> list[RingMesh]:
    """Real meshes without a single edge, connected."""
    meshes = [
        open_mesh(rank, epoch.world_size, epoch.number, secret=b"test", host="127.0.0.1", peers={})
        for rank in range(epoch.world_size)
    ]
    for mesh in meshes:
        mesh.connect({other.rank: other.endpoint for other in meshes}, 5.0)
    return meshes


@pytest.mark.parametrize(("attention", "micro_batches"), [(1, 1), (2, 1), (1, 3)])
def test_equal_to_the_reference_over_meshes_without_edges(
    checkpoint: Checkpoint, requests: list[Request], attention: int, micro_batches: int
) -> None:
    reference = load_model(checkpoint)
    epoch = Epoch(1, attention, 1, 0, micro_batches)
    local = LocalCluster(load_attention(checkpoint), lambda shard: load_ffn(checkpoint, shard), epoch, meshes=lone_meshes(epoch))
    with local:
        outputs = local.generate(requests)
    for request in requests:
        expected = reference.generate_greedy(request.prompt_token_ids, MAX_TOKENS)
        assert [output.token_id for output in outputs[request.id]] == expected, request.id


def test_both_stages_of_every_layer_are_recorded(checkpoint: Checkpoint, requests: list[Request]) -> None:
    local = LocalCluster(load_attention(checkpoint), lambda shard: load_ffn(checkpoint, shard), Epoch(1, 1, 1, 0, 1))
    with local:
        local.generate(requests[:1])
    runs = {stage: durations_us.count for stage, durations_us in local.attention[0].recorder.stages_us().items()}
    steps, layers = runs["head"], checkpoint.config.num_hidden_layers
    assert runs == {"attention": steps * layers, "ffn": steps * layers, "head": steps}


def test_a_lone_attention_rank_has_no_peers() -> None:
    epoch = Epoch(1, 3, 1, 0, 1)
    epoch.check(PRESETS["step3-tiny"])
    assert (epoch.ffn, epoch.world_size, epoch.ffn_ranks) == (0, 3, ())
    assert [epoch.peers(rank) for rank in range(3)] == [(), (), ()]
