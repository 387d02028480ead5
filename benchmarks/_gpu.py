"""What the GPU benchmarks share: is there one, what can it do, how long does a call take. Nothing here needs Ray."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from afd_ray.kernels.gpu.capture import CUDAGraphs
from afd_ray.planning.measured import AttentionTime, FfnTime, Measured

Run = Callable[[], object]

READ_BYTES = 4 << 30
GEMM_SIZE = 8192
ABSENT = "no CUDA GPU here"


class Limits(NamedTuple):
    """What this GPU achieves in this run."""

    bytes_per_s: float
    """Read by a sum over 4 GiB."""
    flops_per_s: dict[torch.dtype, float]
    """Of a square matrix product."""

    def bound_us(self, nbytes: float, flops: float, dtype: torch.dtype) -> float:
        return max(nbytes / self.bytes_per_s, flops / self.flops_per_s[dtype]) * 1e6


class Line(NamedTuple):
    """One size, checked and timed."""

    text: str
    """Of the table."""
    is_right: bool
    time: AttentionTime | FfnTime | None
    """For the planner; None for what no plan is made of."""


def answer(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    columns: str,
    lines: Callable[[argparse.Namespace, Limits], Iterable[Line]],
) -> int:
    """Print a table of what `lines` finds, and write its times where --json says; 1 if a result is wrong, 2 without a GPU."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times there, for `afd-ray plan --measured`")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(ABSENT, file=sys.stderr)
        return 2
    limits = measure_limits()
    print(heading(limits, columns))
    found = []
    for line in lines(args, limits):
        print(line.text, flush=True)
        found.append(line)
    if args.json:
        source = f"{Path(sys.argv[0]).stem}, {date.today().isoformat()}"
        measured = times_of(found, torch.cuda.get_device_name(), source)
        args.json.write_text(measured.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return 0 if all(line.is_right for line in found) else 1


def times_of(lines: Iterable[Line], device: str, source: str) -> Measured:
    """The times of those that computed what they should."""
    times = [line.time for line in lines if line.is_right]
    attention = tuple(time for time in times if isinstance(time, AttentionTime))
    return Measured(device=device, source=source, attention=attention, ffn=tuple(t for t in times if isinstance(t, FfnTime)))


def measure_limits() -> Limits:
    large = torch.ones(READ_BYTES // 8, dtype=torch.int64, device="cuda")
    bandwidth = large.nbytes / (median_us(large.sum) * 1e-6)
    del large
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda").unbind(0)
    flops = 2 * GEMM_SIZE**3
    bf16 = flops / (median_us(lambda: a @ b) * 1e-6)
    narrow, other = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    fp8 = flops / (median_us(lambda: torch._scaled_mm(narrow, other.T, one, one, out_dtype=torch.bfloat16)) * 1e-6)
    return Limits(bandwidth, {torch.bfloat16: bf16, torch.float8_e4m3fn: fp8})


def median_us(run: Run) -> float:
    """Of many replays of a captured graph, so that launching costs nothing; the L2 cache is emptied before each."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    median: float = triton.testing.do_bench(graph.replay, return_mode="median")
    return median * 1e3


def eager_us(run: Run) -> float:
    """Median time on the device, launched anew each time, with whatever it waits for the host in between; the L2 cache is emptied before each."""
    run()  # compiles
    median: float = triton.testing.do_bench(run, return_mode="median")
    return median * 1e3


def replay_us(run: Run) -> float:
    """As `launch_us`, of one captured graph of it: the engine's own way to capture."""
    return launch_us(CUDAGraphs(torch.device("cuda", torch.cuda.current_device()))(_without_result(run)))


def _without_result(run: Run) -> Callable[[], None]:
    def called() -> None:
        run()

    return called


def launch_us(run: Run, times: int = 50) -> float:
    """Median time that the host takes to call it, without waiting for the device."""
    took_us = []
    for _ in range(times):
        torch.cuda.synchronize()
        started_ns = time.perf_counter_ns()
        run()
        took_us.append((time.perf_counter_ns() - started_ns) / 1000)
    return statistics.median(took_us)


def heading(limits: Limits, columns: str) -> str:
    rates = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in limits.flops_per_s.items()
    )
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    machine = f"{date.today().isoformat()}, {torch.cuda.get_device_name()}, {versions}"
    rule = "|".join("---" for _ in columns.split("|")[1:-1])
    return f"{machine}; read {limits.bytes_per_s / 1e12:.2f} TB/s, {rates}\n\n{columns}\n|{rule}|"


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
