"""A small model served by both halves on the GPU kernels, through the engine's own loops, and what the one-process reference says."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.local import LocalCluster
from afd_ray.engine.loop import OnLost
from afd_ray.handoff.capacity import frame_bytes
from afd_ray.handoff.device.carrier import places_for
from afd_ray.handoff.device.device_mesh import DeviceMesh
from afd_ray.handoff.mesh import Mesh
from afd_ray.handoff.quantise import dequantise, quantise
from afd_ray.kernels.quantised import quantise_attention, quantise_dense, quantise_experts
from afd_ray.membership.epoch import Epoch
from afd_ray.models.checkpoint import Checkpoint, load_attention, load_ffn, load_model, write_checkpoint
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.models.scaled import scaled_tensors
from afd_ray.models.step3 import CacheScales, FFNHalf, FFNLayer, FFNShard, Routed, Step3Model
from afd_ray.request import Request, SamplingParams
from tests.device_group import MakeCarrier, connected, ipc, member
from tests.host_device import HostDevice
from tests.triton_device import DEVICE

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
WIDE = replace(CONFIG, hidden_size=128, share_q_dim=128, head_dim=64)
"""Whose weights can be held in e4m3."""
E4M3 = torch.float8_e4m3fn
HERE = torch.device(DEVICE)
PROMPTS = (1, 14, 6)
MAX_TOKENS = 4
BLOCK = 4
"""Tokens: answers go over the end of a block."""
LATE_S = 1e-3
"""Of a stand-in's streams."""
CHUNK = 10
"""Rows of a micro-batch: the longest prompt takes two, and is read while others decode."""


def written(directory: Path, config: ModelConfig = CONFIG) -> Checkpoint:
    """Random weights, in e4m3 where the configuration says so."""
    tensors = random_tensors(config, seed=0)
    write_checkpoint(directory, config, scaled_tensors(tensors) if config.scaled else tensors)
    return Checkpoint.open(directory)


def requests(prompts: tuple[int, ...] = PROMPTS, max_tokens: int = MAX_TOKENS) -> list[Request]:
    """By how many tokens each has."""
    rng = random.Random(1)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return [Request(f"r{i}", tuple(rng.choices(range(CONFIG.vocab_size), k=count)), params) for i, count in enumerate(prompts)]


def cluster(
    checkpoint: Checkpoint,
    epoch: Epoch,
    compute: GPUCompute,
    *,
    cache_dtype: torch.dtype | None = None,
    wire_dtype: torch.dtype | None = None,
    meshes: Sequence[Mesh] | None = None,
    on_lost: OnLost | None = None,
) -> LocalCluster:
    """To be entered."""
    attention = compute.attention(load_attention(checkpoint, shared=epoch.shared_at_attention))
    made: Callable[[FFNHalf], FFNHalf] = compute.ffn if epoch.ffn else compute.colocated_ffn

    def load(shard: FFNShard) -> FFNHalf:
        return made(load_ffn(checkpoint, shard))

    sizes = {"num_blocks": 64, "block_size": BLOCK, "max_tokens_per_micro_batch": CHUNK}
    return LocalCluster(
        attention,
        load,
        epoch,
        **sizes,
        compute=compute,
        cache_dtype=cache_dtype,
        wire_dtype=wire_dtype,
        meshes=meshes,
        on_lost=on_lost,
    )


@contextmanager
def group(
    epoch: Epoch, carrier: MakeCarrier = ipc, wire: torch.dtype | None = None, devices: Sequence[HostDevice] = ()
) -> Iterator[list[DeviceMesh]]:
    """All members of an epoch between stand-ins for devices, one each."""
    config = CONFIG if wire is None else WIDE
    devices = devices or [HostDevice(LATE_S) for _ in range(epoch.world_size)]
    meshes = []
    for rank, device in enumerate(devices):
        peers = {peer: frame_bytes(epoch, rank, peer, config, wire or config.dtype, CHUNK) for peer in epoch.peers(rank)}
        meshes.append(
            member(rank, epoch.world_size, peers, device, carrier, places=places_for(epoch.micro_batches), epoch=epoch.number)
        )
    with connected(meshes):
        yield meshes


def served(local: LocalCluster, asked: list[Request]) -> dict[str, list[int | None]]:
    """Tokens by request."""
    outputs = local.generate(asked)
    return {request.id: [output.token_id for output in outputs[request.id]] for request in asked}


def expected(checkpoint: Checkpoint, asked: list[Request]) -> dict[str, list[int | None]]:
    """What the reference says to the same requests."""
    reference = load_model(checkpoint)
    return {
        request.id: [*reference.generate_greedy(request.prompt_token_ids, request.params.max_tokens or 0)] for request in asked
    }


def rounded_model(checkpoint: Checkpoint, *, wire: bool = False, whole: bool = False, cache: bool = True) -> Step3Model:
    """The reference with routed experts in e4m3, and, unless `cache` is false, keys and values; `wire`: all rows that go to an FFN too; `whole`: all other layers too."""
    model = load_model(checkpoint)
    for index, ffn in enumerate(model.ffn.layers):
        assert isinstance(ffn, FFNLayer)
        layer = model.attention.layer(index)
        quantise_experts(ffn)
        if whole:
            quantise_dense(ffn)
            quantise_attention(layer)
        if cache:
            layer.before = rounding(layer.before, layer.self_attn.cache_scales)  # type: ignore[method-assign]
        if wire:
            layer.after = rounding_rows(layer.after)  # type: ignore[method-assign]
    return model


def rounding(
    before: Callable[..., tuple[Tensor, Tensor, Tensor]], scales: CacheScales
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`AttentionLayer.before` with keys and values as a cache in e4m3 has them."""

    def rounded(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = before(*arguments)
        held = (x.div(scale).clamp(-448, 448).to(E4M3).to(x.dtype) * scale for x, scale in zip((k, v), scales, strict=True))
        return q, *held

    return rounded


def rounding_rows(after: Callable[..., tuple[Tensor, Routed]]) -> Callable[..., tuple[Tensor, Routed]]:
    """`AttentionLayer.after` with what goes to the FFN as a wire in 8 bits brings it."""

    def rounded(*arguments: Tensor) -> tuple[Tensor, Routed]:
        residual, routed = after(*arguments)
        return residual, routed._replace(hidden=dequantise(*quantise(routed.hidden), routed.hidden.dtype))

    return rounded
