"""How near is each stage to what this processor can do? An attention layer, an FFN layer and the head of step3-92m in bfloat16.

Ours beside plain torch, alternated, and beside the bound: the larger of arithmetic over the peak of a large matrix product and bytes over the
bandwidth of a large sum, both measured in the same run. Weights and keys come from memory: every layer of the model takes its turn.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from typing import NamedTuple
from unittest.mock import patch

import torch

from afd_ray.engine.kv_cache import BlockAllocator, PagedCache
from afd_ray.engine.paged_attention import attend_paged, plan_attention
from afd_ray.engine.sampling import sample
from afd_ray.engine.sequence import Chunk
from afd_ray.engine.sequence import Sequence as Generation
from afd_ray.kernels import native
from afd_ray.kernels.packed import packed_attention, packed_ffn
from afd_ray.models.config import ModelConfig
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import AttentionHalf, FFNHalf, FFNShard, Routed
from afd_ray.request import Request, SamplingParams
from benchmarks._machine import hardware

MODEL = PRESETS["step3-92m"]
BLOCK_SIZE = 16
ROWS = (8, 32, 96, 192, 256)
CONTEXTS = (128, 1024)

Run = Callable[[], object]
"""One pass over the layers that are timed."""


class Case(NamedTuple):
    """A stage at one size, and what it must do for one layer."""

    stage: str
    rows: int
    flops: float
    bytes: float


class Halves(NamedTuple):
    attention: AttentionHalf
    ffn: FFNHalf


class Limits(NamedTuple):
    flops_per_s: float
    bytes_per_s: float

    def bound_us(self, case: Case) -> float:
        return max(case.flops / self.flops_per_s, case.bytes / self.bytes_per_s) * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="of each side; the median is taken")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sizes = ROWS[1:3] if args.quick else ROWS
    with torch.inference_mode():
        sides = {"plain": plain_halves(MODEL)}
        sides["ours"] = Halves(
            packed_attention(copy.deepcopy(sides["plain"].attention)), packed_ffn(copy.deepcopy(sides["plain"].ffn))
        )
        limits = measure_limits()
        print(heading(args.threads, limits))
        for case, runs, layers in cases(sides, sizes):
            print(row(case, medians_us(runs, layers, args.repeats), limits), flush=True)
    return 0


def heading(threads: int, limits: Limits) -> str:
    return (
        f"{date.today().isoformat()}, {hardware()}, {threads} thread(s), kernels {'on' if native.available() else 'off'}; "
        f"peak {limits.flops_per_s / 1e9:.0f} GFLOP/s, {limits.bytes_per_s / 1e9:.1f} GB/s\n\n"
        "| stage | rows | bound, us | ours, us | of the bound | plain torch, us | times faster |\n|---|---|---|---|---|---|---|"
    )


def row(case: Case, found_us: dict[str, float], limits: Limits) -> str:
    bound, ours, plain = limits.bound_us(case), found_us["ours"], found_us["plain"]
    return f"| {case.stage} | {case.rows} | {bound:.0f} | {ours:.0f} | {ours / bound:.2f} | {plain:.0f} | {plain / ours:.2f} |"


def medians_us(runs: dict[str, Run], layers: int, repeats: int) -> dict[str, float]:
    """Time of one layer by side, alternated."""
    found: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(repeats + 1):
        for side, run in runs.items():
            started_s = time.perf_counter()
            run()
            found[side].append((time.perf_counter() - started_s) / layers * 1e6)
    return {side: statistics.median(times[1:]) for side, times in found.items()}  # the first one warms up


def measure_limits() -> Limits:
    a, b = torch.randn(2, 1536, 1536).bfloat16().unbind(0)
    large = torch.ones(1 << 25, dtype=torch.int64)
    return Limits(2 * 1536**3 / best_s(lambda: a @ b), large.nbytes / best_s(large.sum))


def best_s(run: Run, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - started_s)
    return min(times)


def plain_halves(config: ModelConfig) -> Halves:
    """Random weights, for time does not depend on them."""
    halves = Halves(AttentionHalf(config).bfloat16(), FFNHalf(config, FFNShard.whole(config)).bfloat16())
    for half in halves:
        for parameter in half.requires_grad_(False).parameters():
            parameter.data.normal_(std=0.02)
    return halves


def cases(sides: dict[str, Halves], sizes: Sequence[int]) -> Iterator[tuple[Case, dict[str, Run], int]]:
    """Every case, with each side's run and over how many layers it goes."""
    layers = sorted(MODEL.moe_layers)
    for context in CONTEXTS:
        for rows in sizes:
            yield attention_case(rows, context), attention_runs(sides, layers, rows, context), len(layers)
    for rows in sizes:
        yield ffn_case(rows), {side: ffn_run(half.ffn, layers, rows) for side, half in sides.items()}, len(layers)
    for rows in sizes:
        yield head_case(rows), {side: head_run(half.attention, rows) for side, half in sides.items()}, 1


def attention_case(rows: int, context: int) -> Case:
    m = MODEL
    heads = m.num_attention_heads * m.head_dim
    weights = m.hidden_size * (m.share_q_dim + 2 * m.head_dim + heads + m.moe_num_experts) + m.share_q_dim * heads
    keys = rows * context * 2 * m.head_dim
    return Case(
        f"attention, context {context}", rows, 2 * rows * weights + 2 * m.num_attention_heads * keys, 2 * (weights + keys)
    )


def ffn_case(rows: int) -> Case:
    m = MODEL
    expert, shared = (3 * m.hidden_size * size for size in (m.moe_intermediate_size, m.share_expert_dim))
    touched = m.moe_num_experts * (1 - (1 - m.moe_top_k / m.moe_num_experts) ** rows)  # expected, under a uniform router
    return Case("FFN", rows, 2 * rows * (m.moe_top_k * expert + shared), 2 * (touched * expert + shared))


def head_case(rows: int) -> Case:
    weights = MODEL.hidden_size * MODEL.vocab_size
    return Case("head and greedy choice", rows, 2 * rows * weights, 2 * weights)


def attention_runs(sides: dict[str, Halves], layers: list[int], rows: int, context: int) -> dict[str, Run]:
    cache, chunks = decoding(rows, context)
    with kernels_off():
        plans = {"plain": plan_attention(chunks, cache)}
    plans["ours"] = plan_attention(chunks, cache)
    residual = torch.randn(rows, MODEL.hidden_size).bfloat16()

    def run_of(side: str) -> Run:
        half, plan = sides[side].attention, plans[side]
        rotary = half.rotary(plan.positions)

        def run() -> None:
            for index in layers:
                layer = half.layer(index)
                q, k, v = layer.before(residual, *rotary)
                cache.write(index, plan.slots, k, v)
                layer.after(residual, attend_paged(cache, index, plan, q))

        return run

    return {side: run_of(side) for side in sides}


def ffn_run(half: FFNHalf, layers: list[int], rows: int) -> Run:
    hidden = torch.randn(rows, MODEL.hidden_size).bfloat16()
    weights, experts = torch.randn(rows, MODEL.moe_num_experts).softmax(-1).topk(MODEL.moe_top_k, dim=-1)
    routed = Routed(hidden, experts, weights.bfloat16())
    return lambda: [half(index, routed) for index in layers]


def head_run(half: AttentionHalf, rows: int) -> Run:
    residual = torch.randn(rows, MODEL.hidden_size).bfloat16()
    sequences = [Generation(Request(f"r{i}", (1,), SamplingParams(temperature=0.0))) for i in range(rows)]
    return lambda: sample(half.logits(residual).float(), sequences)


def decoding(rows: int, context: int) -> tuple[PagedCache, list[Chunk]]:
    """A cache that holds `rows` sequences about to compute token number `context`."""
    blocks = -(-context // BLOCK_SIZE)
    cache = PagedCache(
        layers=MODEL.num_hidden_layers,
        num_blocks=rows * blocks,
        block_size=BLOCK_SIZE,
        head_dim=MODEL.head_dim,
        dtype=torch.bfloat16,
    )
    cache.blocks.normal_()
    allocator = BlockAllocator(rows * blocks, BLOCK_SIZE)
    chunks = []
    for i in range(rows):
        sequence = Generation(Request(f"r{i}", (1,) * context))
        sequence.block_table = allocator.allocate(blocks) or []
        chunks.append(Chunk(sequence, context - 1, 1, samples=True))
    return cache, chunks


@contextmanager
def kernels_off() -> Iterator[None]:
    with patch.object(native, "available", return_value=False):
        yield


if __name__ == "__main__":
    sys.exit(main())
