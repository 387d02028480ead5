"""How long does Step-3's attention layer take with its projections, norms and router, as one decode step of an attention actor runs it?

Projections in e4m3 (`attention.projection_dtype: fp8`), as the paper has them, and in bfloat16; attention, keys and values in bfloat16.

The layer is the engine's own (`kernels.gpu.halves`). Its outputs for some rows are checked against the model's layer in the same dtype, then the whole
is timed. The bound is bytes (weights, keys and values) over the bandwidth of a large sum, or arithmetic over the peak of a large product, both of the
same run. The paper's times are of an H800 (arXiv:2507.19427 Table 9). "captured" is what the layer takes as a
replayed graph, as an actor runs it, and is what the bound and the planner are told; "eager" what it takes launched anew. The last columns are the host's
own time a layer: to launch it, to replay it, and of an actor's whole turn with a graph: rows returned by the FFN sent to the device, the layer, and what
it gives fetched to the host, which waits for all of it. A second table has the captured times beside the sums of their kernels, as torch's profiler tells them.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.engine.compute import Needs
from afd_ray.engine.gpu.captured import AttentionGraphs
from afd_ray.engine.kv_cache import PagedCache
from afd_ray.engine.passage import Part
from afd_ray.engine.sequence import Chunk, Sequence
from afd_ray.kernels.gpu.capture import Capture, CUDAGraphs
from afd_ray.kernels.gpu.halves import GPUAttentionLayer, Returned, StepRows
from afd_ray.kernels.quantised import quantise_attention
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import AttentionHalf, AttentionLayer, Routed, rotary_table
from afd_ray.models.step3 import attend as attend_whole
from afd_ray.planning.measured import AttentionTime
from afd_ray.request import Request
from benchmarks._gpu import KernelSums, Limits, Line, Run, answer, eager_us, error, launch_us, median_us, replay_us

STEP_3 = replace(PRESETS["step3"], num_hidden_layers=1, moe_layers=frozenset({0}))
ROWS, CONTEXTS, PAGE, INSTANCES = (64, 128), (4096, 8192, 32768), 64, 2
PAPER_US = {(64, 8192): 281, (64, 32768): 791}
LARGEST_ERROR = {False: 2e-2, True: 5e-2}
"""By whether projections are in e4m3: what differs by a rounding in attention may then be rounded to a neighbour."""
COLUMNS = (
    "| projections | rows | context | bound, us | captured, us | of the bound | the paper's (H800), us | eager, us "
    "| host launching, us | host replaying, us | a whole turn, us | error |"
)


class Step(NamedTuple):
    """What one layer is given for a micro-batch."""

    residual: Tensor  # [N, H]
    returned: Returned  # sums [U, N, H], what the FFN instances returned for the layer before
    blocks: Tensor  # [P, PAGE, 2 * D]
    rows: StepRows


class Output(NamedTuple):
    """What leaves the layer."""

    residual: Tensor  # [N, H]
    hidden: Tensor  # [N, H], for the FFN
    experts: Tensor  # [N, K]
    weights: Tensor  # [N, K]


def main(argv: Many[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the paper's batch and contexts alone")
    return answer(parser, argv, COLUMNS, lines)


def lines(args: argparse.Namespace, limits: Limits) -> Iterator[Line]:
    wide = layer_of(STEP_3, torch.device("cuda"))
    layers, sums = {True: narrowed(wide), False: wide}, KernelSums("projections | rows | context")
    for rows in ROWS[:1] if args.quick else ROWS:
        for context in CONTEXTS[1:] if args.quick else CONTEXTS:
            if rows * context * STEP_3.kv_width * 2 < 0.5 * torch.cuda.mem_get_info()[0]:
                step = step_of(STEP_3, rows, context, torch.device("cuda"))
                for narrow, layer in layers.items():
                    yield line(layer, step, limits, narrow, sums)
    yield from sums.lines()


def line(layer: AttentionLayer, step: Step, limits: Limits, narrow: bool, sums: KernelSums) -> Line:
    rows, context, ours = len(step.residual), int(step.rows.contexts[0]), GPUAttentionLayer(layer)
    bound = bound_us(STEP_3, layer, rows, context, limits)
    found = difference(run(ours, step), expected(layer, step))
    took, launched = median_us(lambda: ours(*step)), eager_us(lambda: ours(*step))
    host = (
        launch_us(lambda: ours(*step)),
        replay_us(lambda: ours(*step)),
        launch_us(turn_of(STEP_3, ours, step, CUDAGraphs(step.residual.device))),
    )
    paper = PAPER_US.get((rows, context), "") if narrow else ""
    cells = f"{'e4m3' if narrow else 'bfloat16'} | {rows} | {context}"
    sums.add(cells, took, partial(again, layer, rows, context))
    text = f"| {cells} |"
    text += f" {bound:.0f} | {took:.0f} | {bound / took:.2f} | {paper} | {launched:.0f} |"
    text += "".join(f" {us:.1f} |" for us in host) + f" {found:.1e} |"
    # Plans are made of 8-bit weights.
    time = AttentionTime(rows=rows, context=context, cache_bytes=2, part="layer", us=took) if narrow else None
    return Line(text, found < LARGEST_ERROR[narrow], time)


def again(layer: AttentionLayer, rows: int, context: int) -> Run:
    """The layer over other inputs of that size."""
    ours, step = GPUAttentionLayer(layer), step_of(STEP_3, rows, context, torch.device("cuda"))
    return lambda: ours(*step)


def bound_us(config: ModelConfig, layer: AttentionLayer, rows: int, context: int, limits: Limits) -> float:
    """Weights, keys and values once, or every product at the peak of its dtype; products of weights in e4m3 at that of e4m3."""
    flops = {torch.bfloat16: 4.0 * rows * config.num_attention_heads * context * config.head_dim, torch.float8_e4m3fn: 0.0}
    nbytes = 2 * rows * context * config.kv_width
    for weight in layer.parameters():
        nbytes += weight.nbytes
        if weight.dtype in flops and weight.dim() == 2:
            flops[weight.dtype] += 2 * rows * weight.numel()
    products_us = sum(count / limits.flops_per_s[dtype] for dtype, count in flops.items()) * 1e6
    return max(nbytes / limits.bytes_per_s * 1e6, products_us)


def narrowed(layer: AttentionLayer) -> AttentionLayer:
    """With projections in e4m3."""
    narrow = copy.copy(layer)
    narrow._modules = dict(layer._modules) | {"self_attn": copy.copy(layer.self_attn)}
    narrow.self_attn._modules = dict(layer.self_attn._modules)
    quantise_attention(narrow)
    return narrow


def turn_of(config: ModelConfig, layer: GPUAttentionLayer, step: Step, capture: Capture) -> Callable[[], Routed]:
    """A layer of an attention actor's micro-batch by its graph: from what the FFN returned to the layer, to rows in host memory."""
    rows, context, device = len(step.residual), int(step.rows.contexts[0]), step.residual.device
    config = replace(config, num_hidden_layers=2, moe_layers=frozenset({0, 1}), vocab_size=64)
    with torch.device("meta"):
        half = AttentionHalf(config)
    half.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=config.dtype)
    half.layers = torch.nn.ModuleList([layer, layer])
    half.requires_grad_(False)
    cache = PagedCache(layers=2, num_blocks=1, block_size=PAGE, head_dim=config.head_dim, dtype=config.dtype, device=device)
    cache.num_blocks, cache.blocks = len(step.blocks) - 1, step.blocks.expand(2, *step.blocks.shape)
    pages = step.rows.tables.view(rows, -1).tolist()
    chunks = []
    for row, table in enumerate(pages):
        sequence = Sequence(Request(str(row), (0,) * context))
        sequence.block_table = table
        chunks.append(Chunk(sequence, context - 1, 1, samples=True))
    passage = AttentionGraphs(half, cache, Needs(rows, rows, 1, INSTANCES), capture).begin(0, chunks)
    assert passage is not None
    parts = [Part(instance, slice(0, rows), sums.cpu()) for instance, sums in enumerate(step.returned.sums)]

    def turn() -> Routed:
        passage.add_parts(parts)
        return passage.to_host(passage.attend(1))

    return turn


def layer_of(config: ModelConfig, device: torch.device) -> AttentionLayer:
    """With random weights of a size that keeps the rows about as large."""
    with device:
        layer = AttentionLayer(config, 0).to(config.dtype).requires_grad_(False)
    for parameter in layer.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(1.0)
    return layer


def step_of(config: ModelConfig, rows: int, context: int, device: torch.device) -> Step:
    """Rows that each decode the last of `context` tokens, their pages in random order."""
    pages = -(-context // PAGE)
    with device:
        blocks = torch.empty(rows * pages, PAGE, config.kv_width, dtype=config.dtype).normal_()
        tables = torch.randperm(len(blocks)).int()
        starts = torch.arange(0, len(blocks), pages, dtype=torch.int32)
        last = tables.view(rows, pages)[:, -1] * PAGE + (context - 1) % PAGE
        residual = torch.empty(rows, config.hidden_size, dtype=config.dtype).normal_()
        partials = torch.empty(INSTANCES, rows, config.hidden_size, dtype=config.dtype).normal_()
        cos, sin = rotary_table(torch.full((rows,), context - 1), config.head_dim, config.rope_theta)
        contexts, none = torch.full((rows,), context, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    return Step(residual, Returned(partials), blocks, StepRows(cos, sin, last, tables, starts, contexts, none, none, rows))


def run(layer: GPUAttentionLayer, step: Step) -> Output:
    residual, (hidden, experts, weights, _) = layer(*step)
    return Output(residual, hidden, experts, weights)


def expected(layer: AttentionLayer, step: Step, most: int = 4) -> Output:
    """The first rows by the model's own layer, over the cache as `run` left it."""
    rows = min(most, len(step.residual))
    residual = step.residual[:rows]
    for returned in step.returned.sums:
        residual = residual + returned[:rows]
    told = step.rows
    q, _, _ = layer.before(residual, told.cos[:rows], told.sin[:rows])
    attended = []
    for row in range(rows):
        context, start = int(told.contexts[row]), int(told.starts[row])
        pages = told.tables[start : start + -(-context // PAGE)].long()
        keys, values = step.blocks[pages].flatten(0, 1)[:context].chunk(2, dim=1)
        attended.append(attend_whole(q[row : row + 1], keys, values, context - 1))
    residual, (hidden, experts, weights, _) = layer.after(residual, torch.cat(attended))
    assert experts is not None
    assert weights is not None
    return Output(residual, hidden, experts, weights)


def difference(found: Output, right: Output) -> float:
    """The larger relative error of residual and hidden rows. Experts may differ where two are about as likely."""
    rows = len(right.residual)
    return max(error(found.residual[:rows], right.residual), error(found.hidden[:rows], right.hidden))


if __name__ == "__main__":
    sys.exit(main())
