"""What the GPU benchmarks share: is there one, what can it do, how long does a call take. Nothing here needs Ray."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from afd_ray.kernels.gpu.capture import CUDAGraphs
from afd_ray.planning.measured import AttentionTime, FfnTime, Measured

Run = Callable[[], object]

READ_BYTES = 4 << 30
GEMM_SIZE = 8192
PROFILED = 10
"""Replays whose kernels are looked at."""
CACHE_BYTES = 256 << 20
"""More than any L2 cache holds."""
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


class Span(NamedTuple):
    """Something that the device did, as the profiler tells of it."""

    name: str
    start_us: float
    us: float


class KernelSums:
    """A table below the other one, of each captured time beside the sum of its kernels: what is between them is gaps.

    It is made when all else is timed, for what the profiler leaves behind it might slow that.
    """

    def __init__(self, columns: str) -> None:
        """`columns`: what tells sizes apart."""
        self._columns = f"| {columns} | captured, us | kernels, us | captured / kernels |"
        self._cases: list[tuple[str, float, Callable[[], Run]]] = []

    def add(self, cells: str, captured_us: float, prepare: Callable[[], Run]) -> None:
        """`prepare`: lays the inputs out anew; what it gives is captured and profiled."""
        self._cases.append((cells, captured_us, prepare))

    def lines(self, kernels_of: Callable[[Run], float] | None = None) -> Iterator[Line]:
        """Where there is no profiler "n/a", and the reason below; one that failed is not tried again."""
        yield Line(f"\n{self._columns}\n{_rule(self._columns)}", True, None)
        reason = ""
        for cells, captured_us, prepare in self._cases:
            figures = "n/a | n/a"
            try:
                if not reason:
                    us = (kernels_of or kernels_us)(prepare())
                    figures = f"{us:.1f} | {captured_us / us:.3f}"
            except Exception as error:  # whatever the profiler runs into, the times above stand
                reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no reason given')}"
            yield Line(f"| {cells} | {captured_us:.1f} | {figures} |", True, None)
        if reason:
            yield Line(f"\nNo sums of kernels: {reason}", True, None)


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
    source = f"{Path(sys.argv[0]).stem}, {date.today().isoformat()}"
    for line in lines(args, limits):
        print(line.text, flush=True)
        found.append(line)
        if args.json:  # each time: whatever ends this process, what is measured stays
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


def eager_us(run: Run, for_ms: int = 100) -> float:
    """Median time on the device, launched anew each time, with whatever it waits for the host in between; the L2 cache is emptied before each."""
    run()  # compiles
    median: float = triton.testing.do_bench(run, rep=for_ms, return_mode="median")
    return median * 1e3


def replay_us(run: Run) -> float:
    """As `launch_us`, of one captured graph of it: the engine's own way to capture."""
    return launch_us(CUDAGraphs(torch.device("cuda", torch.cuda.current_device()))(_without_result(run)))


def kernels_us(run: Run) -> float:
    """Sum of the times of all that one replay of it has the device do, the L2 cache emptied before; RuntimeError where the profiler does not tell."""
    os.environ |= {
        "TEARDOWN_CUPTI": "0",
        "DISABLE_CUPTI_LAZY_REINIT": "1",
    }  # as torch has it where graphs are profiled: CUPTI crashes
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    with profile(
        activities=[ProfilerActivity.CUDA]
    ):  # a graph that is made before the profiler has ever looked may be opaque to it
        cache.zero_()
        torch.cuda.synchronize()
    replay = CUDAGraphs(torch.device("cuda", torch.cuda.current_device()))(_without_result(run))
    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            cache.zero_()
            replay()
            torch.cuda.synchronize()
    return replayed_us(device_spans(profiled.events() or ()), PROFILED)


def device_spans(events: Iterable[Any]) -> list[Span]:
    """What the profiler's events tell of the device, without the calls of the host, in order."""
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = [Span(event.name, event.time_range.start, event.time_range.elapsed_us()) for event in on_device]
    return sorted(spans, key=lambda span: span.start_us)


def replayed_us(spans: Sequence[Span], replays: int) -> float:
    """Median over replays of their sums; what comes first in each has emptied the cache. RuntimeError unless all have done the same."""
    count, left = divmod(len(spans), replays)
    each = [spans[first : first + count] for first in range(0, replays * count, max(1, count))]
    if left or count < 2 or len({tuple(span.name for span in replay) for replay in each}) > 1:
        raise RuntimeError(
            f"the profiler tells of {len(spans)} events on the device, not of the same in each of {replays} replays"
        )
    return statistics.median(sum(span.us for span in replay[1:]) for replay in each)


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
    return f"{machine}; read {limits.bytes_per_s / 1e12:.2f} TB/s, {rates}\n\n{columns}\n{_rule(columns)}"


def _rule(columns: str) -> str:
    return f"|{'|'.join('---' for _ in columns.split('|')[1:-1])}|"


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
