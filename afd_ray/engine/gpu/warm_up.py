"""Everything that a step may launch is launched once before steps do it, so that none of them waits for a kernel to be compiled.

A kernel is compiled anew for other sizes and dtypes; the launchers see to it that numbers of rows make none. What is left depends on the model,
on how many splits decode attention takes, on how many FFN instances return rows, and on the dtype of the expert ids that come over the wire.
"""

from collections.abc import Callable

import torch
from torch import nn

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.step import Step, padding, send
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.handoff.quantise import quantise
from afd_ray.handoff.rows import ID_DTYPES
from afd_ray.kernels.gpu.halves import FedFFN, GPUAttentionLayer, Returned, decoding_counts, head
from afd_ray.models.step3 import AttentionHalf, FFNHalf, Narrow, Routed


def warm_up_attention(half: AttentionHalf, cache: PagedCache, needs: Needs, ffn: FFNHalf | None = None) -> None:
    """`half` as `gpu_attention` gives it, `ffn` as `gpu_ffn`; waits for the device."""
    layers = _one_of_each(half.layers, lambda layer: layer.gate is None)
    for decoding in decoding_counts(half.config.num_attention_heads, cache.blocks, needs.rows):
        step = send(padding(cache, decoding, chunks=1), half, cache.blocks.device)
        _run(half, cache, layers, step, None, ffn)
        if needs.instances:
            _run(half, cache, layers, step, _nothing_returned(half, step, needs.instances), None)
    _wait(cache.blocks.device)


def warm_up_ffn(half: FedFFN) -> None:
    """`half` takes rows from `rows_from`, wide or in e4m3; waits for the device."""
    hidden = torch.zeros(1, half.config.hidden_size, dtype=half.config.dtype, device=half.rows_from)
    narrow = Narrow(*quantise(hidden))
    for index in _one_of_each(half.layers, lambda layer: layer.moe is None):
        for routed in (Routed(hidden, None, None), Routed(narrow.values, None, None, narrow)):
            if half.config.is_moe(index):
                weights = torch.ones(1, half.config.moe_top_k, dtype=hidden.dtype, device=hidden.device)
                for dtype in (*ID_DTYPES, torch.int32):  # the last in captured graphs
                    half(index, routed._replace(experts=torch.zeros_like(weights, dtype=dtype), weights=weights))
            else:
                half(index, routed)


def _run(
    half: AttentionHalf, cache: PagedCache, layers: list[int], step: Step, returned: Returned | None, ffn: FFNHalf | None
) -> None:
    residual = half.embed_tokens(step.token_ids)
    for index in layers:
        layer = half.layers[index]
        assert isinstance(layer, GPUAttentionLayer)
        _, routed = layer(residual, returned, cache.blocks[index], step.rows)
        layer.share(routed.hidden)
        if ffn is not None:
            ffn(index, routed)
    head(half, residual, returned)


def _nothing_returned(half: AttentionHalf, step: Step, instances: int) -> Returned:
    rows, device = len(step.token_ids), step.token_ids.device
    sums = torch.zeros(1, half.config.hidden_size, dtype=half.config.dtype, device=device)
    return Returned(sums, torch.full((instances, rows), -1, dtype=torch.int32, device=device))


def _one_of_each(layers: nn.ModuleList, kind: Callable[[nn.Module], bool]) -> list[int]:
    """Dense layers launch other kernels than layers with experts; layers of a kind launch the same."""
    return sorted({kind(layer): index for index, layer in enumerate(layers)}.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
