"""How long does Step-3's attention layer take with its projections, norms and router, in bfloat16, as one decode step of an attention actor runs it?

The layer's outputs for some rows are checked against the model's own layer in the same dtype, then the whole is timed. The bound is bytes (weights, keys
and values) over the bandwidth of a large sum, or arithmetic over the peak of a large product, both of the same run. The paper's times are of an
H800, with FP8 products for the projections (arXiv:2507.19427 Table 9).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.kernels.gpu.decode_attention import attend, splits_for
from afd_ray.kernels.gpu.norm_quantise import add_norm_quantise
from afd_ray.kernels.gpu.paged_softmax import Rows
from afd_ray.kernels.gpu.rope_kv_write import rotate_and_write
from afd_ray.kernels.gpu.router import route
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import AttentionLayer, rotary_table
from afd_ray.models.step3 import attend as attend_whole
from afd_ray.planning.measured import AttentionTime
from benchmarks._gpu import Limits, Line, answer, error, median_us

STEP_3 = replace(PRESETS["step3"], num_hidden_layers=1, moe_layers=frozenset({0}))
ROWS, CONTEXTS, PAGE, INSTANCES = (64, 128), (4096, 8192, 32768), 64, 2
PAPER_US = {(64, 8192): 281, (64, 32768): 791}
LARGEST_ERROR = 2e-2
COLUMNS = "| rows | context | bound, us | ours, us | of the bound | the paper's (H800), us | error |"


class Step(NamedTuple):
    """What one layer is given for a micro-batch."""

    residual: Tensor  # [N, H]
    partials: Tensor  # [U, N, H], what the FFN instances returned for the layer before
    cos: Tensor  # [N, D / 2] float32
    sin: Tensor
    slots: Tensor  # [N], where each row's key and value go
    blocks: Tensor  # [P, PAGE, 1, 2, D]
    tables: Tensor
    starts: Tensor  # [N]
    contexts: Tensor  # [N], the row itself included


class Output(NamedTuple):
    """What leaves the layer."""

    residual: Tensor  # [N, H]
    hidden: Tensor  # [N, H], for the FFN
    experts: Tensor  # [N, K]
    weights: Tensor  # [N, K]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the paper's batch and contexts alone")
    return answer(parser, argv, COLUMNS, lines)


def lines(args: argparse.Namespace, limits: Limits) -> Iterator[Line]:
    layer = layer_of(STEP_3, torch.device("cuda"))
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    for rows in ROWS[:1] if args.quick else ROWS:
        for context in CONTEXTS[1:] if args.quick else CONTEXTS:
            if rows * context * STEP_3.kv_width * 2 < 0.5 * torch.cuda.mem_get_info()[0]:
                step = step_of(STEP_3, rows, context, torch.device("cuda"))
                yield line(layer, step, splits_for(rows, multiprocessors), limits)


def line(layer: AttentionLayer, step: Step, splits: int, limits: Limits) -> Line:
    rows, context = len(step.residual), int(step.contexts[0])
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    nbytes = 2 * (parameters + rows * context * STEP_3.kv_width)
    flops = 2 * rows * (parameters + 2 * STEP_3.num_attention_heads * context * STEP_3.head_dim)
    bound = limits.bound_us(nbytes, flops, torch.bfloat16)
    found = difference(run(layer, step, splits), expected(layer, step))
    ours = median_us(lambda: run(layer, step, splits))
    paper = PAPER_US.get((rows, context), "")
    text = f"| {rows} | {context} | {bound:.0f} | {ours:.0f} | {bound / ours:.2f} | {paper} | {found:.1e} |"
    time = AttentionTime(rows=rows, context=context, cache_bytes=2, part="layer", us=ours)
    return Line(text, found < LARGEST_ERROR, time)


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
        blocks = torch.empty(rows * pages, PAGE, 1, 2, config.head_dim, dtype=config.dtype).normal_()
        tables = torch.randperm(len(blocks)).int()
        starts = torch.arange(0, len(blocks), pages, dtype=torch.int32)
        last = tables.view(rows, pages)[:, -1] * PAGE + (context - 1) % PAGE
        residual = torch.empty(rows, config.hidden_size, dtype=config.dtype).normal_()
        partials = torch.empty(INSTANCES, rows, config.hidden_size, dtype=config.dtype).normal_()
        cos, sin = rotary_table(torch.full((rows,), context - 1), config.head_dim, config.rope_theta)
        contexts = torch.full((rows,), context, dtype=torch.int32)
    return Step(residual, partials, cos, sin, last, blocks, tables, starts, contexts)


def run(layer: AttentionLayer, step: Step, splits: int) -> Output:
    """The layer by the GPU kernels; the projections are torch's products."""
    attention, epsilon = layer.self_attn, layer.input_layernorm.eps
    combined = add_norm_quantise(step.residual, step.partials, layer.input_layernorm.weight, epsilon, scales=None)
    x = combined.hidden
    narrow = add_norm_quantise(attention.q_proj(x), None, attention.inter_norm.weight, epsilon, scales=None).hidden
    q = attention.wq(narrow).view(-1, attention.heads, attention.head_dim)
    tokens = step.blocks.view(-1, 2 * attention.head_dim)
    rotate_and_write(q, attention.k_proj(x), attention.v_proj(x), step.cos, step.sin, step.slots, tokens)
    context = attend(Rows(q, step.blocks, step.tables, step.starts, step.contexts), splits=splits)
    added = attention.o_proj(context.flatten(1))[None]
    sent = add_norm_quantise(combined.residual, added, layer.post_attention_layernorm.weight, epsilon)
    assert layer.moe is not None
    experts, weights = route(layer.moe["gate"](sent.hidden), layer.top_k, layer.normalise, sent.hidden.dtype)
    return Output(sent.residual, sent.hidden, experts, weights)


def expected(layer: AttentionLayer, step: Step, most: int = 4) -> Output:
    """The first rows by the model's own layer, over the cache as `run` left it."""
    rows = min(most, len(step.residual))
    residual = step.residual[:rows]
    for partial in step.partials:
        residual = residual + partial[:rows]
    q, _, _ = layer.before(residual, step.cos[:rows], step.sin[:rows])
    attended = []
    for row in range(rows):
        context, start = int(step.contexts[row]), int(step.starts[row])
        pages = step.tables[start : start + -(-context // PAGE)].long()
        keys, values = step.blocks[pages].flatten(0, 2)[:context].unbind(1)
        attended.append(attend_whole(q[row : row + 1], keys, values, context - 1))
    residual, (hidden, experts, weights) = layer.after(residual, torch.cat(attended))
    assert experts is not None
    assert weights is not None
    return Output(residual, hidden, experts, weights)


def difference(found: Output, right: Output) -> float:
    """The larger relative error of residual and hidden rows. Experts may differ where two are about as likely."""
    rows = len(right.residual)
    return max(error(found.residual[:rows], right.residual), error(found.hidden[:rows], right.hidden))


if __name__ == "__main__":
    sys.exit(main())
