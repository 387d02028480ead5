"""How long does Step-3's FFN layer take on one rank of 16 (TP8 x EP2), shared expert included, as one step of an FFN actor runs it?

Weights in e4m3 (`ffn.expert_dtype` and `ffn.dense_dtype: fp8`), for rows that come in e4m3 (`handoff.wire_dtype: fp8`), and all in bfloat16.

The layer is the engine's own (`kernels.gpu.halves`), without what ranks of a server exchange. Some rows are checked against the model's layer in the
same dtype, then the whole is timed: on the device alone, captured as a graph ("captured", which the bound is compared with) and launched anew ("eager");
what the host takes to launch it and to replay it; and with rows that come from host memory and go back there, which is how actors hand over for now.
The bound is bytes (weights of the experts that are chosen and of the shared one, rows in and out once) over the bandwidth of a large sum,
or arithmetic over the peak of a large product, both of the same run. A second table has the captured times beside the sums of their kernels, as torch's
profiler tells them.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from afd_ray.kernels.gpu.capture import Capture, CUDAGraphs
from afd_ray.kernels.gpu.captured_ffn import FFNGraphs
from afd_ray.kernels.gpu.halves import GPUFFN, FedFFN, gpu_ffn
from afd_ray.kernels.gpu.quantise_rows import quantise_rows
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import FFNHalf, FFNLayer, FFNShard, Narrow, Routed, Slice
from benchmarks._gpu import KernelSums, Limits, Line, Run, answer, eager_us, error, launch_us, median_us, replay_us

STEP_3 = replace(PRESETS["step3"], num_hidden_layers=1, moe_layers=frozenset({0}))
TENSOR, INSTANCES = 8, 2
ROWS = (64, 256, 1024, 2048, 4096)
CHECKED = 64
LARGEST_ERROR = {False: 2e-2, True: 5e-2}
"""By whether weights are in e4m3."""
COLUMNS = (
    "| weights | rows | bound, us | captured, us | of the bound | eager, us | host launching, us | host replaying, us "
    "| from and to the host, eager, us | captured, us | error |"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the paper's batch alone")
    return answer(parser, argv, COLUMNS, lines)


def lines(args: argparse.Namespace, limits: Limits) -> Iterator[Line]:
    device, sums = torch.device("cuda"), KernelSums("weights | rows")
    for narrow in (True, False):
        held = half_of(STEP_3, device)
        plain = held.layers[0]
        assert isinstance(plain, FFNLayer)
        half = gpu_ffn(held, device, quantise=narrow, dense=narrow)
        for rows in ROWS[3:4] if args.quick else ROWS:
            yield line(plain, half, rows_of(STEP_3, rows, device, narrow), limits, sums)
    yield from sums.lines()


def half_of(config: ModelConfig, device: torch.device) -> FFNHalf:
    """One rank's part of a layer, with random weights of a size that keeps the rows about as large."""
    shard = FFNShard(tuple(range(config.moe_num_experts // INSTANCES)), Slice(0, TENSOR), Slice(0, TENSOR * INSTANCES))
    with device:
        half = FFNHalf(config, shard).to(config.dtype).requires_grad_(False)
    for parameter in half.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return half


def rows_of(config: ModelConfig, rows: int, device: torch.device, narrow: bool = False) -> Routed:
    """That choose among all experts alike; `narrow`: in e4m3 too."""
    with device:
        hidden = torch.randn(rows, config.hidden_size).to(config.dtype)
        experts = torch.rand(rows, config.moe_num_experts).argsort(1)[:, : config.moe_top_k].to(torch.uint8).contiguous()
        packed = quantise_rows(hidden) if narrow else None
        return Routed(hidden, experts, torch.rand(rows, config.moe_top_k).to(config.dtype), packed)


def line(plain: FFNLayer, half: GPUFFN, routed: Routed, limits: Limits, sums: KernelSums) -> Line:
    narrow, device = routed.narrow is not None, routed.hidden.device
    bound = limits.bound_us(*cost(plain, routed), torch.float8_e4m3fn if narrow else torch.bfloat16)
    found = difference(plain, routed, half(0, routed))
    ours, launched = median_us(lambda: half(0, routed)), eager_us(lambda: half(0, routed))
    host = launch_us(lambda: half(0, routed)), replay_us(lambda: half(0, routed))
    fed, replayed = FedFFN(half, device), fed_by_graphs(half, len(routed.hidden), CUDAGraphs(device), narrow)
    hosted = on_the_host(routed)
    through = launch_us(lambda: fed(0, hosted)), launch_us(lambda: replayed(0, hosted))
    times = " | ".join([f"{launched:.0f}", *(f"{us:.1f}" for us in (*host, *through))])
    figures = f"{bound:.0f} | {ours:.0f} | {bound / ours:.2f} | {times} | {found:.1e}"
    cells = f"{'e4m3' if narrow else 'bfloat16'} | {len(routed.hidden)}"
    sums.add(cells, ours, partial(again, half, len(routed.hidden), device, narrow))
    return Line(f"| {cells} | {figures} |", found < LARGEST_ERROR[narrow], None)


def again(half: GPUFFN, rows: int, device: torch.device, narrow: bool) -> Run:
    """The layer over other rows."""
    routed = rows_of(STEP_3, rows, device, narrow)
    return lambda: half(0, routed)


def on_the_host(routed: Routed) -> Routed:
    """As rows come over the wire."""
    hidden, experts, weights, packed = routed
    narrow = None if packed is None else Narrow(*(tensor.cpu() for tensor in packed))
    assert experts is not None
    assert weights is not None
    return Routed(hidden.cpu() if narrow is None else narrow.values, experts.cpu(), weights.cpu(), narrow)


def fed_by_graphs(half: GPUFFN, rows: int, capture: Capture, narrow: bool = False) -> FedFFN:
    """As an actor holds it."""
    fed = FedFFN(half, next(half.parameters()).device)
    fed.replayed = FFNGraphs(fed, rows, narrow=narrow, capture=capture)
    return fed


def cost(layer: FFNLayer, routed: Routed) -> tuple[float, float]:
    """Bytes and FLOPs, at least."""
    assert layer.moe is not None
    assert layer.share_expert is not None
    assert routed.experts is not None
    held = routed.experts[routed.experts < layer.held]
    expert = 3 * layer.moe.gate_proj[0].numel()
    item = layer.moe.gate_proj.dtype.itemsize
    shared = sum(parameter.numel() for parameter in layer.share_expert.parameters())
    rows, given = len(routed.hidden), routed.hidden if routed.narrow is None else routed.narrow.values
    nbytes = item * (len(held.unique()) * expert + shared) + given.nbytes + 2 * routed.hidden.numel()
    return nbytes, 2 * (held.numel() * expert + rows * shared)


def difference(plain: FFNLayer, routed: Routed, found: Tensor) -> float:
    """Relative error of the first rows."""
    some = (None if tensor is None else tensor[:CHECKED] for tensor in routed[:3])
    return error(found[:CHECKED], plain(*some))


if __name__ == "__main__":
    sys.exit(main())
