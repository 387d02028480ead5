"""After the warm-up no step asks for a kernel that is not compiled yet; what cannot be compiled is told in one line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu import warm_up
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.kernels.gpu import halves, linear
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention
from tests.gpu_cluster import E4M3, HERE, WIDE, cluster, expected, requests, served, written
from tests.specialisations import recorded
from tests.triton_device import COMPILED

pytestmark = pytest.mark.skipif(COMPILED, reason="what is asked for is recorded by the interpreter")

MULTIPROCESSORS = 6
"""So few that the rows of these tests need different numbers of splits."""
KERNELS = {
    "add_norm_quantise_kernel",
    "rotate_and_write_kernel",
    "attend_kernel",
    "combine_kernel",
    "prefill_kernel",
    "route_kernel",
    "order_kernel",
    "gate_up_kernel",
    "down_kernel",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    return written(directory)


@pytest.mark.parametrize(
    "epoch",
    [
        Epoch(1, 1, 1, 2, 2, dispatch="routed"),
        pytest.param(Epoch(1, 2, 2, 1, 2, shared_at_attention=True), marks=pytest.mark.full),
        pytest.param(Epoch(1, 1, 1, 0, 2), marks=pytest.mark.full),
    ],
    ids=["routed", "shared at attention", "colocated"],
)
def test_steps_ask_for_no_kernel_that_the_warm_up_has_not_launched(
    checkpoint: Checkpoint, epoch: Epoch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halves, "multiprocessors", lambda device: MULTIPROCESSORS)
    asked = requests(prompts=(1, 12, 1, 5), max_tokens=3)
    with recorded() as warmed:
        local = cluster(checkpoint, epoch, GPUCompute(HERE))
    with recorded() as asked_for, local:
        found = served(local, asked)
    assert found == expected(checkpoint, asked)
    assert {launched.kernel for launched in asked_for} == KERNELS
    assert asked_for - warmed == set()


@pytest.mark.parametrize(
    ("head_dim", "multiprocessors", "launches"),
    [(64, 1, {"quantise_rows_kernel"}), (128, 6, {"quantise_rows_kernel", "combine_kernel"})],
    ids=["heads that share a scale", "heads of whole blocks"],
)
def test_that_goes_for_e4m3_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_dim: int, multiprocessors: int, launches: set[str]
) -> None:
    """Rows of prompts that stand beside a changing number of others are quantised by the same kernel."""
    compute = GPUCompute(HERE, quantise_experts=True, quantise_dense=True, quantise_projections=True, quantise_rows=True)
    monkeypatch.setattr(linear, "multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(halves, "multiprocessors", lambda device: multiprocessors)
    checkpoint = written(tmp_path, replace(WIDE, head_dim=head_dim))
    with recorded() as warmed:
        local = cluster(checkpoint, Epoch(1, 1, 1, 1, 1), compute, cache_dtype=E4M3, wire_dtype=E4M3)
    with recorded() as asked_for, local:
        for prompts in ((5,), (1, 5, 1)):
            served(local, requests(prompts, max_tokens=2))
    assert {launched.kernel for launched in asked_for} == (KERNELS - {"combine_kernel"}) | {"linear_kernel"} | launches
    assert asked_for - warmed == set()


def test_an_epoch_with_more_instances_is_warmed_up_before_it_is_entered(checkpoint: Checkpoint) -> None:
    compute = GPUCompute(HERE)
    asked = requests(prompts=(1,), max_tokens=2)
    with cluster(checkpoint, Epoch(1, 1, 1, 1, 1), compute) as local:
        served(local, asked)
        with recorded() as warmed:
            local.change(Epoch(2, 1, 1, 2, 1, dispatch="routed"))
        with recorded() as asked_for:
            assert served(local, asked) == expected(checkpoint, asked)
    assert warmed
    assert {launched for launched in asked_for - warmed if launched.kernel == "add_norm_quantise_kernel"} == set()


def test_one_instance_less_asks_for_nothing_new(checkpoint: Checkpoint) -> None:
    compute = GPUCompute(HERE)
    half = compute.attention(load_attention(checkpoint))
    cache = compute.cache(half.config, num_blocks=3, block_size=2, dtype=half.config.dtype)
    warmed = []
    for instances in (2, 1):
        with recorded() as launched:
            compute.warm_up_attention(half, cache, Needs(rows=2, decoding=2, slots=1, instances=instances))
        warmed.append(launched)
    assert warmed[0] == warmed[1] != set()


def test_a_warm_up_leaves_the_blocks_of_requests_alone(checkpoint: Checkpoint) -> None:
    compute = GPUCompute(HERE)
    half = compute.attention(load_attention(checkpoint))
    cache = compute.cache(half.config, num_blocks=3, block_size=2, dtype=half.config.dtype)
    compute.warm_up_attention(half, cache, Needs(rows=4, decoding=4, slots=1, instances=2))
    assert cache.blocks.shape[1] == 4
    assert not cache.blocks[:, :3].any()
    assert cache.blocks[:, 3].any()


def test_what_cannot_run_is_told_in_one_line(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise RuntimeError("ptxas failed\nwith error code 255")

    monkeypatch.setattr(warm_up, "head", refuse)
    compute = GPUCompute(HERE)
    half = compute.attention(load_attention(checkpoint))
    cache = compute.cache(half.config, num_blocks=3, block_size=2, dtype=torch.float32)
    told = r"^attention\.num_gpus: this GPU cannot run the kernels of this model: RuntimeError: ptxas failed$"
    with pytest.raises(RuntimeError, match=told):
        compute.warm_up_attention(half, cache, Needs(rows=4, decoding=4, slots=1, instances=1))
