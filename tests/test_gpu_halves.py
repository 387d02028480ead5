"""Both halves by the GPU kernels through the engine's own loops: token for token the one-process reference, interpreted on a CPU or on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.kernels.gpu.halves import gpu_attention, gpu_ffn
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_ffn, read_ffn
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard, Routed, Slice
from tests.gpu_cluster import CONFIG, HERE, MAX_TOKENS, PROMPTS, cluster, expected, requests, served, written
from tests.triton_device import error, noise

GPU = GPUCompute(HERE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    return written(directory)


def check_equal(checkpoint: Checkpoint, epoch: Epoch, prompts: tuple[int, ...] = PROMPTS, max_tokens: int = MAX_TOKENS) -> None:
    asked = requests(prompts, max_tokens)
    with cluster(checkpoint, epoch, GPUCompute(HERE)) as local:
        found = served(local, asked)
    assert found == expected(checkpoint, asked)


@pytest.mark.full
def test_both_halves_equal_the_reference(checkpoint: Checkpoint) -> None:
    """Chunked prompts beside rows that decode, two instances that some rows do not go to, shared experts where a row's first expert is.

    The tests of the warm-up and of graphs serve the like.
    """
    check_equal(checkpoint, Epoch(1, 1, 1, 2, 2, dispatch="routed"))


@pytest.mark.full
@pytest.mark.parametrize(
    "epoch",
    [
        Epoch(1, 2, 1, 1, 3),
        Epoch(1, 1, 2, 1, 2),
        Epoch(1, 2, 2, 2, 2, dispatch="routed"),
        Epoch(1, 1, 1, 2, 2, shared_at_attention=True),
    ],
    ids=lambda epoch: f"{epoch.attention}A-tp{epoch.tensor_parallel}-ep{epoch.expert_parallel}",
)
def test_both_halves_equal_the_reference_in_other_shapes(checkpoint: Checkpoint, epoch: Epoch) -> None:
    check_equal(checkpoint, epoch, prompts=(1, 40, 17, 8, 23), max_tokens=12)


@pytest.mark.full
def test_colocated_halves_equal_the_reference(checkpoint: Checkpoint) -> None:
    check_equal(checkpoint, Epoch(1, 1, 1, 0, 2))


@pytest.mark.parametrize("at_home", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_an_ffn_layer_equals_the_plain_one(checkpoint: Checkpoint, at_home: bool, shared: bool) -> None:
    shard = FFNShard((1, 3), first_id=2, at_home=at_home, shared=shared)
    generator = noise(3)
    hidden, weights = torch.randn(5, CONFIG.hidden_size, generator=generator), torch.rand(5, 2, generator=generator)
    routed = Routed(hidden, torch.tensor([[2, 3], [1, 2], [3, 4], [0, 1], [4, 0]], dtype=torch.uint8), weights)
    expected = load_ffn(checkpoint, shard)(1, routed)
    assert error(GPU.ffn(load_ffn(checkpoint, shard))(1, routed), expected) < 1e-5


def test_a_half_for_another_shard_takes_over_what_is_held(checkpoint: Checkpoint) -> None:
    held, wanted = GPU.ffn(load_ffn(checkpoint, FFNShard((1, 3)))), FFNShard((0, 3), first_id=2)
    half = GPU.regathered_ffn(held, wanted, lambda shard, dense: read_ffn(checkpoint, shard, CONFIG.dtype, dense=dense))
    generator = noise(4)
    routed = Routed(
        torch.randn(3, CONFIG.hidden_size, generator=generator),
        torch.tensor([[2, 3], [0, 1], [3, 1]], dtype=torch.uint8),
        torch.rand(3, 2, generator=generator),
    )
    assert error(half(1, routed), load_ffn(checkpoint, wanted)(1, routed)) < 1e-5
    assert half.shard == wanted


def test_shapes_that_the_kernels_do_not_take_are_refused() -> None:
    device = HERE
    with pytest.raises(ValueError, match=r"moe_intermediate_size: .* must be a multiple of 64 .* got 32"):
        gpu_ffn(FFNHalf(CONFIG, FFNShard((0,), routed=Slice(0, 4))), device)
    with pytest.raises(ValueError, match="head_dim: must be a power of two"):
        gpu_attention(AttentionHalf(replace(CONFIG, head_dim=24)), device)
