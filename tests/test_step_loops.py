"""The step loops over the loopback mesh: token for token the one-process reference, and planted faults are caught."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afd_ray.engine.kv_cache import check_integrity
from afd_ray.engine.local import LocalCluster
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn, load_model, write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.step3 import FFNHalf, FFNShard, Routed, Slice
from afd_ray.request import Request, SamplingParams

MAX_TOKENS = 24
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
    checkpoint: Checkpoint, epoch: Epoch, load: Callable[[FFNShard], FFNHalf] | None = None, num_blocks: int = 400
) -> LocalCluster:
    chunked = {"max_tokens_per_micro_batch": 48, "num_blocks": num_blocks}
    return LocalCluster(load_attention(checkpoint), load or (lambda shard: load_ffn(checkpoint, shard)), epoch, **chunked)


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
