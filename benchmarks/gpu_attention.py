"""How near is decode attention, 64 query heads x 256 over one key head, to the bandwidth that this GPU reads with?

Each size is checked against torch in float32 on a few of its rows, then timed beside torch's own attention over contiguous keys in bfloat16, and
beside FlashAttention-3 and FlashInfer over the same pages where these are installed. The bound is bytes of keys and values over the bandwidth of a large sum, or arithmetic over the peak of a large product, both of the same run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.kernels.gpu.decode_attention import attend, splits_for
from afd_ray.kernels.gpu.paged_softmax import Rows
from afd_ray.planning.measured import AttentionTime
from benchmarks._gpu import Limits, Line, Run, answer, error, median_us
from benchmarks._gpu_peers import Peers, cells, flash_attention_3, flashinfer_decode

HEADS, DIM, PAGE = 64, 256, 64
BATCHES, CONTEXTS = (1, 16, 64, 128), (1024, 8192, 32768)
LARGEST_ERROR = 1e-2
COLUMNS = "| keys | rows | context | splits | bound, us | ours, us | of the bound | torch, us | FA3, us | FlashInfer, us | quickest peer / ours | error |"


class Case(NamedTuple):
    rows: int
    context: int
    cached: torch.dtype


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the paper's batch and contexts alone")
    parser.add_argument("--splits", type=int, nargs="*", help="try these instead of what splits_for says")
    return answer(parser, argv, COLUMNS, lines)


def lines(args: argparse.Namespace, limits: Limits) -> Iterator[Line]:
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    peers = Peers()
    for case in cases(args.quick):
        inputs = inputs_of(case)
        for splits in args.splits or [splits_for(case.rows, multiprocessors)]:
            yield row(case, inputs, splits, limits, peers)
    yield from peers.notes()


def cases(quick: bool) -> Iterator[Case]:
    free, _ = torch.cuda.mem_get_info()
    for cached in (torch.bfloat16, torch.float8_e4m3fn):
        for rows in (64,) if quick else BATCHES:
            for context in CONTEXTS[1:] if quick else CONTEXTS:
                # Pages, what is picked of them, and the peer's copy in bfloat16.
                if rows * context * 2 * DIM * (2 * cached.itemsize + 2) < 0.8 * free:
                    yield Case(rows, context, cached)


def inputs_of(case: Case) -> Rows:
    """Pages in random order."""
    pages = -(-case.context // PAGE)
    blocks = torch.empty(case.rows * pages, PAGE, 1, 2, DIM, dtype=case.cached, device="cuda")
    for part in blocks.split(4096):  # converted piece by piece: the whole in float32 would not fit beside it
        part.copy_(torch.randn(part.shape, device="cuda"))
    tables = torch.randperm(len(blocks), device="cuda").int()
    starts = torch.arange(0, len(blocks), pages, dtype=torch.int32, device="cuda")
    contexts = torch.full((case.rows,), case.context, dtype=torch.int32, device="cuda")
    return Rows(torch.randn(case.rows, HEADS, DIM, dtype=torch.bfloat16, device="cuda"), blocks, tables, starts, contexts)


def row(case: Case, inputs: Rows, splits: int, limits: Limits, peers: Peers) -> Line:
    nbytes = case.rows * (case.context * 2 * DIM * case.cached.itemsize + 2 * HEADS * DIM * 2)
    bound = limits.bound_us(nbytes, 4 * case.rows * HEADS * case.context * DIM, torch.bfloat16)
    found = error(attend(inputs, splits=splits)[:4], expected(inputs, case.context, min(4, case.rows)))
    ours = median_us(lambda: attend(inputs, splits=splits))
    times_us = peers.times_us(
        {
            "torch": lambda: torch_attention(inputs, case),
            f"FA3 ({case.cached})": lambda: flash_attention_3(inputs, case.context),
            f"FlashInfer ({case.cached})": lambda: flashinfer_decode(inputs, case.context),
        }
    )
    name = str(case.cached).removeprefix("torch.")
    figures = f"{bound:.0f} | {ours:.0f} | {bound / ours:.2f} | {cells(times_us, ours)} | {found:.1e}"
    text = f"| {name} | {case.rows} | {case.context} | {splits} | {figures} |"
    cache_bytes: Literal[1, 2] = 1 if case.cached.itemsize == 1 else 2
    time = AttentionTime(rows=case.rows, context=case.context, cache_bytes=cache_bytes, part="core", us=ours)
    return Line(text, found < LARGEST_ERROR, time)


def gathered(inputs: Rows, context: int, rows: int) -> Tensor:
    """Keys and values of the first rows: [rows, context, 2, D]."""
    pages = -(-context // PAGE)
    picked = inputs.blocks.view(torch.uint8)[inputs.tables[: rows * pages].long()].view(
        inputs.blocks.dtype
    )  # bytes, as e4m3 may not be indexed
    return picked.view(rows, pages * PAGE, 2, DIM)[:, :context]


def expected(inputs: Rows, context: int, rows: int) -> Tensor:
    keys, values = gathered(inputs, context, rows).float().unbind(2)
    scores = inputs.q[:rows].float() @ keys.transpose(1, 2) * DIM**-0.5
    return scores.softmax(-1) @ values


def torch_attention(inputs: Rows, case: Case) -> Run:
    """In bfloat16: the heads stand where a sequence's rows would, keys and values are contiguous."""
    keys, values = (part.bfloat16().contiguous()[:, None] for part in gathered(inputs, case.context, case.rows).unbind(2))
    q = inputs.q[:, None]
    return lambda: F.scaled_dot_product_attention(q, keys, values)


if __name__ == "__main__":
    sys.exit(main())
