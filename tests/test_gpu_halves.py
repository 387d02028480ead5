"""Both halves by the GPU kernels through the engine's own loops: token for token the one-process reference, interpreted on a CPU or on a GPU."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.local import LocalCluster
from afd_ray.kernels.gpu.halves import gpu_attention, gpu_ffn
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn, load_model, read_ffn, write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard, Routed, Slice
from afd_ray.request import Request, SamplingParams
from tests.triton_device import DEVICE, error, noise

CONFIG = replace(
    PRESETS["step3-tiny"],
    num_hidden_layers=2,
    moe_layers=frozenset({1}),
    moe_num_experts=4,
    moe_top_k=2,
    moe_intermediate_size=128,
    share_expert_dim=128,
    vocab_size=128,
)
GPU = GPUCompute(torch.device(DEVICE))
PROMPTS = (1, 14, 6)
MAX_TOKENS = 4
BLOCK = 4
"""Tokens: answers go over the end of a block."""
CHUNK = 10
"""Rows of a micro-batch: the longest prompt takes two, and is read while others decode."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, CONFIG, random_tensors(CONFIG, seed=0))
    return Checkpoint.open(directory)


def requests(prompts: tuple[int, ...], max_tokens: int) -> list[Request]:
    rng = random.Random(1)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [Request(f"r{i}", tuple(rng.choices(range(CONFIG.vocab_size), k=count)), params) for i, count in enumerate(prompts)]


def check_equal(
    checkpoint: Checkpoint,
    epoch: Epoch,
    made: Callable[[FFNHalf], FFNHalf] = GPU.ffn,
    prompts: tuple[int, ...] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
) -> None:
    attention = GPU.attention(load_attention(checkpoint, shared=epoch.shared_at_attention))

    def load(shard: FFNShard) -> FFNHalf:
        return made(load_ffn(checkpoint, shard))

    asked, reference = requests(prompts, max_tokens), load_model(checkpoint)
    sizes = {"num_blocks": 64, "block_size": BLOCK, "max_tokens_per_micro_batch": CHUNK}
    with LocalCluster(attention, load, epoch, **sizes, begin=GPU.begin) as local:
        outputs = local.generate(asked)
    for request in asked:
        expected = reference.generate_greedy(request.prompt_token_ids, max_tokens)
        assert [output.token_id for output in outputs[request.id]] == expected, request.id


def test_both_halves_equal_the_reference(checkpoint: Checkpoint) -> None:
    """Chunked prompts beside rows that decode, two instances that some rows do not go to, shared experts where a row's first expert is."""
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
    check_equal(checkpoint, Epoch(1, 1, 1, 0, 2), made=GPU.colocated_ffn)


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
    device = torch.device(DEVICE)
    with pytest.raises(ValueError, match=r"moe_intermediate_size: .* must be a multiple of 64 .* got 32"):
        gpu_ffn(FFNHalf(CONFIG, FFNShard((0,), routed=Slice(0, 4))), device)
    with pytest.raises(ValueError, match="head_dim: must be a power of two"):
        gpu_attention(AttentionHalf(replace(CONFIG, head_dim=24)), device)
