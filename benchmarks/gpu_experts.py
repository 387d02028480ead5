"""How near are Step-3's routed experts, as one FFN rank of 16 holds them (TP8 x EP2), to what this GPU can do?

Each size is checked against float32, then timed beside torch's grouped product in bfloat16 and, where it is installed, beside DeepGEMM's products in
e4m3. The bound is bytes (weights of the experts that
are chosen, rows in and out once) over the bandwidth of a large sum, or arithmetic over the peak of a large product, both of the same run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.handoff.quantise import BLOCK
from afd_ray.kernels.gpu.expert_gemm import Experts, feed_forward
from afd_ray.planning.measured import FfnTime
from benchmarks._gpu import Limits, Line, Run, answer, error, median_us
from benchmarks._gpu_peers import Peers, cells, deep_gemm

EXPERTS, HELD, TOP_K, HIDDEN, INNER = 48, 24, 3, 7168, 640
RANKS = 16
SCALE = 2.0**-6
ROWS = (64, 256, 1024, 2048, 4096, 8192)
LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float8_e4m3fn: 5e-2}
"""In e4m3 what SwiGLU gives is rounded too, which the reference here does not do."""
COLUMNS = "| dtype | rows | bound, us | ours, us | of the bound | torch bf16, us | DeepGEMM, products alone, us | quickest peer / ours | error |"


class Inputs(NamedTuple):
    experts: Experts
    x: Tensor
    exponents: Tensor | None
    ids: Tensor
    weights: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the paper's batch alone")
    return answer(parser, argv, COLUMNS, lines)


def lines(args: argparse.Namespace, limits: Limits) -> Iterator[Line]:
    wide, peers = weights_of(), Peers()
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        experts = narrowed(wide) if dtype == torch.float8_e4m3fn else wide
        for rows in ROWS[3:4] if args.quick else ROWS:
            yield row(inputs_of(experts, rows), wide, limits, peers)
    yield from peers.notes()


def weights_of() -> Experts:
    """Bfloat16 numbers that are e4m3 numbers times a power of two, so that both dtypes compute the same."""
    return Experts(*(_random(*shape) for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))))


def _random(outputs: int, inputs: int) -> Tensor:
    numbers = torch.randn(HELD, outputs, inputs, dtype=torch.bfloat16, device="cuda")
    return numbers.to(torch.float8_e4m3fn).bfloat16() * SCALE


def narrowed(wide: Experts) -> Experts:
    """The same in e4m3."""
    values = [(part / SCALE).to(torch.float8_e4m3fn) for part in wide[:3]]
    shapes = [(HELD, part.shape[1] // BLOCK, part.shape[2] // BLOCK) for part in values]
    return Experts(*values, *(torch.full(shape, SCALE, device="cuda") for shape in shapes))


def inputs_of(experts: Experts, rows: int) -> Inputs:
    x = torch.randn(rows, HIDDEN, device="cuda")
    ids = torch.rand(rows, EXPERTS, device="cuda").argsort(1)[:, :TOP_K].int()
    weights = torch.rand(rows, TOP_K, dtype=torch.bfloat16, device="cuda")
    narrow = experts.gate.dtype == torch.float8_e4m3fn
    exponents = torch.full((rows, HIDDEN // BLOCK), 127, dtype=torch.uint8, device="cuda") if narrow else None
    return Inputs(experts, x.to(experts.gate.dtype), exponents, ids.contiguous(), weights)


def row(inputs: Inputs, wide: Experts, limits: Limits, peers: Peers) -> Line:
    dtype, rows = inputs.x.dtype, len(inputs.x)
    held = inputs.ids[inputs.ids < HELD]
    nbytes = len(held.unique()) * 3 * HIDDEN * INNER * dtype.itemsize + rows * HIDDEN * (dtype.itemsize + 2)
    bound = limits.bound_us(nbytes, 6 * held.numel() * HIDDEN * INNER, dtype)

    def ours() -> Tensor:
        return feed_forward(inputs.experts, inputs.x, inputs.ids, inputs.weights, exponents=inputs.exponents)

    found = error(ours(), expected(inputs, wide))
    ours_us = median_us(ours)
    times_us = peers.times_us({"torch": lambda: torch_grouped(inputs, wide)})
    times_us["DeepGEMM"] = None
    if dtype == torch.float8_e4m3fn:
        times_us |= peers.times_us({"DeepGEMM": lambda: deep_gemm(inputs.experts, inputs.x, inputs.ids)})
    figures = f"{bound:.0f} | {ours_us:.0f} | {bound / ours_us:.2f} | {cells(times_us, ours_us)} | {found:.1e}"
    # Plans are made of 8-bit weights.
    time = FfnTime(rows=rows, ranks=RANKS, part="routed", us=ours_us) if dtype == torch.float8_e4m3fn else None
    return Line(f"| {str(dtype).removeprefix('torch.')} | {rows} | {figures} |", found < LARGEST_ERROR[dtype], time)


def expected(inputs: Inputs, wide: Experts) -> Tensor:
    total, wide_x = torch.zeros(inputs.x.shape, device="cuda"), inputs.x.float()  # e4m3 may not be indexed
    for expert in range(HELD):
        rows, slots = (inputs.ids == expert).nonzero(as_tuple=True)
        gate, up, down = (part[expert].float() for part in wide[:3])
        x = wide_x[rows]
        y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        total.index_add_(0, rows, y * inputs.weights[rows, slots, None].float())
    return total


def torch_grouped(inputs: Inputs, wide: Experts) -> Run:
    """Its grouped products over rows that are sorted already; gathering them and adding them up are counted."""
    flat = inputs.ids.flatten()
    order = flat.argsort(stable=True)[: int((flat < HELD).sum())]
    ends = torch.bincount(flat[order], minlength=HELD).cumsum(0).int()
    rows, shares = order // TOP_K, inputs.weights.flatten()[order, None]
    x = inputs.x.bfloat16()
    gate, up, down = (part.transpose(1, 2) for part in wide[:3])

    def run() -> Tensor:
        gathered = x[rows]
        gated = F.silu(torch._grouped_mm(gathered, gate, offs=ends)) * torch._grouped_mm(gathered, up, offs=ends)
        return torch.zeros_like(x).index_add_(0, rows, torch._grouped_mm(gated, down, offs=ends) * shares)

    return run


if __name__ == "__main__":
    sys.exit(main())
