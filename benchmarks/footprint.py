"""What does an actor cost at rest? CPU of each idle A and F actor beside a bare Ray actor, and the memory of each role.

Bound: an idle actor is a bare Ray actor (at most 0.3 points of a core above it is asked); a role's memory is its own tensors' bytes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import ray

from actors.cluster import Cluster
from afd_ray.config import parse_config
from benchmarks._machine import hardware
from benchmarks.overlap import preset_in


class Bare:
    """A Ray actor that has imported torch and does nothing."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)

    async def pid(self) -> int:
        return os.getpid()

    async def resident(self) -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a step3-92m checkpoint (default: made in a temporary directory)")
    parser.add_argument("--attention", type=int, default=1)
    parser.add_argument("--expert-parallel", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of idling")
    parser.add_argument("--quick", action="store_true", help="a short run")
    args = parser.parse_args(argv)
    seconds = 10.0 if args.quick else args.seconds
    with tempfile.TemporaryDirectory() as made:
        model = args.model or preset_in(Path(made) / "step3-92m")
        print(json.dumps(measure(model, args.attention, args.expert_parallel, seconds)))
    return 0


def measure(model: Path, attention: int, expert_parallel: int, seconds: float) -> dict[str, Any]:
    raw = {"model": {"path": str(model)}, "attention": {"replicas": attention}, "ffn": {"expert_parallel": expert_parallel}}
    with Cluster.start(parse_config(raw)) as cluster:
        bare = ray.remote(Bare).options(num_cpus=0).remote()
        status = cluster.status()
        pids = {actor["id"]: int(actor["pid"]) for role in ("attention", "ffn") for actor in status[role]}
        pids["bare"] = ray.get(bare.pid.remote())
        memory = ray.get(cluster.controller.resident_bytes.remote())
        resident_bare = ray.get(bare.resident.remote())
        shares = idle_shares(pids, seconds)
    above = {name: round(share - shares["bare"], 3) for name, share in shares.items() if name != "bare"}
    return {
        "benchmark": "footprint",
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "seconds": seconds,
        "idle_percent_of_a_core": {name: round(share, 3) for name, share in shares.items()},
        "points_above_bare": above,
        "memory_mb": {
            name: {"weights": mb(held["weights"]), "resident_above_bare": mb(held["resident"] - resident_bare)}
            for name, held in memory.items()
        },
    }


def idle_shares(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """Percent of a core by process, over a time in which nothing is asked of any."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    started_s = time.monotonic()
    time.sleep(seconds)  # idling is what is measured
    elapsed_s = time.monotonic() - started_s
    return {name: 100 * (cpu_s(pid) - before[name]) / elapsed_s for name, pid in pids.items()}


def cpu_s(pid: int) -> float:
    """User and system time of a process, to the scheduler's nanosecond where the kernel tells it."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def mb(count: int) -> float:
    return round(count / 1e6, 1)


if __name__ == "__main__":
    sys.exit(main())
