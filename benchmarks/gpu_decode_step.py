"""Does a decode step of many layers take longer than its kernels, and what does the host do for each layer meanwhile?

One process computes both halves (`ffn.colocated`): a step is one captured graph of all layers (`engine.gpu.whole_step`). At Step-3's full dimensions in
e4m3 (weights, and rows between the halves; keys and values in bfloat16), all 61 layers, which share one layer's weights, keys and values: these do not fit into the
L2 cache, so that each layer reads them anew, as if it had its own. Beside it `step3-92m` in bfloat16.
What the graph gives is checked against the same layers launched one by one, four of them: with random weights more layers tell of rounding, which makes
now and then a row choose another expert. The bound is bytes (weights, keys and values) over the bandwidth of a large
sum of the same run. "host" is the host's own time for a whole step, from the sequences to the launch, by layer; "launched anew" the step's time without graphs. A second table has the
captured times beside the sums of their kernels.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.engine.gpu.passage import GPUPassage
from afd_ray.engine.gpu.whole_step import WholePassage, WholeSteps
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.kernels.gpu.capture import Capture, CUDAGraphs, eagerly
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import AttentionHalf, FFNHalf
from afd_ray.request import Request
from benchmarks._gpu import KernelSums, Limits, Line, Run, answer, eager_us, error, launch_us
from benchmarks._random_model import random_attention, random_ffn

PAGE = 64
LARGEST_ERROR = 2e-2
FOR_MS = 1000
"""Each time is measured: a step may take 100."""
CHECKED = 4
"""Layers."""
COLUMNS = (
    "| model | layers | rows | context | bound, ms | captured, ms | of the bound | launched anew, ms | host a layer, us | error |"
)


class Case(NamedTuple):
    name: str
    config: ModelConfig
    narrow: bool
    rows: int
    context: int


STEP_3 = Case("Step-3's layers", PRESETS["step3"], True, 64, 8192)
SMALL = Case("step3-92m", PRESETS["step3-92m"], False, 64, 1024)


class Halves(NamedTuple):
    """Of all layers, on the device, and where they keep keys and values."""

    attention: AttentionHalf
    ffn: FFNHalf
    cache: PagedCache
    weight_bytes: int
    """Read once a layer."""


def main(argv: Many[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Step-3's layers at the paper's batch alone")
    return answer(parser, argv, COLUMNS, lines)


def lines(args: argparse.Namespace, limits: Limits) -> Iterator[Line]:
    device = torch.device("cuda")
    sums = KernelSums("model | rows | context")
    for case in (STEP_3,) if args.quick else (STEP_3, STEP_3._replace(rows=128), SMALL, SMALL._replace(rows=8)):
        yield line(case, device, limits, sums)
        _emptied()
    with torch.inference_mode():
        yield from sums.lines()


@torch.inference_mode()
def line(case: Case, device: torch.device, limits: Limits, sums: KernelSums) -> Line:
    halves, chunks, layers = halves_of(case, device), chunks_of(case), case.config.num_hidden_layers
    found = difference(halves, chunks, CUDAGraphs(device))
    repeat(halves, layers)
    steps = steps_of(halves, case.rows, CUDAGraphs(device))
    passage = begun(steps, chunks)
    bound = limits.bound_us(layers * (halves.weight_bytes + kv_bytes(case)), 0, torch.bfloat16)
    took = eager_us(passage.launch, FOR_MS)
    anew, host = eager_us(lambda: one_by_one(halves, chunks), FOR_MS), launch_us(lambda: steps.begin(0, chunks))
    figures = f"{bound / 1e3:.2f} | {took / 1e3:.2f} | {bound / took:.2f} | {anew / 1e3:.2f} | {host / layers:.1f} | {found:.1e}"
    sums.add(f"{case.name} | {case.rows} | {case.context}", took, partial(again, case, device))
    return Line(f"| {case.name} | {layers} | {case.rows} | {case.context} | {figures} |", found < LARGEST_ERROR, None)


def again(case: Case, device: torch.device) -> Run:
    """All that the graph of such a step launches."""
    _emptied()
    halves = halves_of(case, device)
    repeat(halves, case.config.num_hidden_layers)
    return begun(steps_of(halves, case.rows, eagerly), chunks_of(case)).launch


def begun(steps: WholeSteps, chunks: Many[Chunk]) -> WholePassage:
    passage = steps.begin(0, chunks)
    assert passage is not None
    return passage


def halves_of(case: Case, device: torch.device) -> Halves:
    """One layer with experts, `CHECKED` times."""
    one = replace(case.config, num_hidden_layers=1, moe_layers=frozenset({0}), max_position_embedding=case.context)
    quantise = dict.fromkeys(("quantise_experts", "quantise_dense", "quantise_projections", "quantise_rows"), case.narrow)
    compute = GPUCompute(device, **quantise)
    attention = compute.attention(random_attention(one, device, narrow=case.narrow))
    ffn = compute.colocated_ffn(random_ffn(one, device, narrow=case.narrow))
    weights = sum(tensor.nbytes for half in (attention, ffn) for tensor in half.layers[0].parameters())
    cache = compute.cache(one, case.rows * -(-case.context // PAGE), PAGE, one.dtype)
    cache.blocks.normal_()
    halves = Halves(attention, ffn, cache, weights)
    repeat(halves, CHECKED)
    return halves


def repeat(halves: Halves, count: int) -> None:
    """Have so many layers."""
    cache = halves.cache
    cache.layers, cache.blocks = count, cache.blocks[:1].expand(count, *cache.blocks.shape[1:])
    for half in (halves.attention, halves.ffn):
        half.config = replace(half.config, num_hidden_layers=count, moe_layers=frozenset(range(count)))
        half.layers = nn.ModuleList([half.layers[0]] * count)


def difference(halves: Halves, chunks: Many[Chunk], capture: Capture) -> float:
    """Relative error of the logits by the graph; of the median row, for a few may choose another expert."""
    passage = begun(steps_of(halves, len(chunks), capture), chunks)
    ours, right = passage.logits(), one_by_one(halves, chunks).logits()
    return statistics.median(error(*rows) for rows in zip(ours, right, strict=True))


def steps_of(halves: Halves, rows: int, capture: Capture) -> WholeSteps:
    return WholeSteps(halves.attention, halves.ffn, halves.cache, Needs(rows, rows, slots=1, instances=0), capture, sizes=(rows,))


def chunks_of(case: Case) -> list[Chunk]:
    """Sequences that each decode the last token of their context."""
    pages = -(-case.context // PAGE)
    chunks = []
    for row in range(case.rows):
        sequence = Sequence(Request(str(row), (row % 7,) * case.context))
        sequence.block_table = [*range(row * pages, (row + 1) * pages)]
        chunks.append(Chunk(sequence, case.context - 1, 1, samples=True))
    return chunks


def one_by_one(halves: Halves, chunks: Many[Chunk]) -> GPUPassage:
    passage = GPUPassage(halves.attention, halves.cache, chunks)
    for layer in range(halves.attention.config.num_hidden_layers):
        passage.add(halves.ffn(layer, passage.attend(layer)))
    return passage


def kv_bytes(case: Case) -> int:
    """Of one layer."""
    return case.rows * case.context * case.config.kv_width * case.config.dtype.itemsize


def _emptied() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
