"""What is this GPU, and what does it reach: bytes read and copied, products, what a launch costs, what is installed beside it?"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch
import triton

from benchmarks._gpu import ABSENT, Limits, launch_us, measure_limits, median_us, replay_us

COPIED_BYTES = 2 << 30
SENT_BYTES = 64 << 20
PEERS = ("ray", "fa3_fwd", "flash_attn_interface", "flashinfer", "deep_gemm", "transformers")
PROGRAMS = ("nvidia-cuda-mps-control", "nvcc", "ninja")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same: it takes seconds")
    parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(ABSENT, file=sys.stderr)
        return 2
    print("| what | figure |\n|---|---|")
    for what, figure in [*device(), *installed(), *rates(measure_limits())]:
        print(f"| {what} | {figure} |", flush=True)
    return 0


def device() -> Iterator[tuple[str, str]]:
    properties = torch.cuda.get_device_properties(0)
    yield "device", torch.cuda.get_device_name()
    yield "multiprocessors, memory", f"{properties.multi_processor_count}, {properties.total_memory / 2**30:.1f} GiB"
    yield "compute capability", f"{properties.major}.{properties.minor}"
    yield "driver", _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    yield "torch, CUDA, Triton", f"{torch.__version__}, {torch.version.cuda}, {triton.__version__}"
    yield "NCCL", ".".join(str(part) for part in torch.cuda.nccl.version())


def installed() -> Iterator[tuple[str, str]]:
    """What the other benchmarks may use."""
    yield "Python packages", ", ".join(name for name in PEERS if importlib.util.find_spec(name)) or "none of the peers"
    yield "programs", ", ".join(name for name in PROGRAMS if shutil.which(name)) or f"none of {', '.join(PROGRAMS)}"


def rates(limits: Limits) -> Iterator[tuple[str, str]]:
    yield "read by a sum", f"{limits.bytes_per_s / 1e12:.2f} TB/s"
    large = torch.empty(2, COPIED_BYTES, dtype=torch.uint8, device="cuda")
    copied_us = median_us(lambda: large[0].copy_(large[1]))
    yield "copied, read and written", f"{2 * COPIED_BYTES / copied_us / 1e6:.2f} TB/s"
    for dtype, rate in limits.flops_per_s.items():
        yield f"product, {str(dtype).removeprefix('torch.')}", f"{rate / 1e12:.0f} TFLOP/s"
    here, pinned = (
        torch.empty(SENT_BYTES, dtype=torch.uint8, device="cuda"),
        torch.empty(SENT_BYTES, dtype=torch.uint8).pin_memory(),
    )
    for name, target, source in (("from pinned memory", here, pinned), ("to pinned memory", pinned, here)):
        yield name, f"{SENT_BYTES / median_us(lambda t=target, s=source: t.copy_(s, non_blocking=True)) / 1e3:.1f} GB/s"  # type: ignore[misc]
    few = torch.zeros(64, device="cuda")
    yield "host's time to launch, to replay", f"{launch_us(lambda: few.add_(1)):.1f} us, {replay_us(lambda: few.add_(1)):.1f} us"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known"


if __name__ == "__main__":
    sys.exit(main())
