"""Does anything grow under full load? Memory, shared-memory segments, file descriptors and threads of every actor of a live cluster.

Bound: flat, which is that the mean of the last quarter is above that of the second by less than 2% or 1 MB (memory) or by less than 1 (counts).
The first quarter is warming up.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from actors.cluster import Cluster
from afd_ray.config import parse_config
from afd_ray.request import SamplingParams
from benchmarks._machine import hardware
from benchmarks.overlap import preset_in

VOCABULARY = 4096
QUARTERS = 4
FLAT_SHARE, FLAT_MB, FLAT_COUNT = 0.02, 1.0, 1.0


class Sample(NamedTuple):
    """What one process held at one time."""

    at_s: float
    resident_mb: float
    shared_mb: float
    """Of the resident memory, shared segments: an edge's ring is touched bit by bit."""
    segments: int
    """Shared memory mapped."""
    descriptors: int
    threads: int


def sample(pid: int, at_s: float) -> Sample:
    """Of a live process; raises FileNotFoundError for a dead one."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    resident_mb, shared_mb = (int(status[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "RssShmem"))
    mapped = {line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line}
    descriptors = len(list((process / "fd").iterdir()))
    return Sample(at_s, resident_mb, shared_mb, len(mapped), descriptors, int(status["Threads"]))


class Trend(NamedTuple):
    """One measure of one actor over the run."""

    first: float
    last: float
    per_hour: float
    """Slope of the least-squares line after the first quarter."""
    flat: bool


def trend(times_s: Sequence[float], values: Sequence[float], tolerance: float) -> Trend:
    """At least 4 samples; flat when the last quarter's mean is above the second quarter's by less than the tolerance."""
    quarter = len(values) // QUARTERS
    settled, end = mean(values[quarter : 2 * quarter]), mean(values[-quarter:])
    return Trend(values[0], values[-1], 3600 * slope(times_s[quarter:], values[quarter:]), end - settled < tolerance)


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line."""
    time_0, value_0 = mean(times), mean(values)
    spread = sum((t - time_0) ** 2 for t in times)
    return sum((t - time_0) * (v - value_0) for t, v in zip(times, values, strict=True)) / spread


def trends(samples: Sequence[Sample]) -> dict[str, Trend]:
    """By measure, for one process."""
    times_s = [s.at_s for s in samples]
    found = {}
    for measure in Sample._fields[1:]:
        values = [float(getattr(s, measure)) for s in samples]
        tolerance = max(FLAT_MB, FLAT_SHARE * values[0]) if measure.endswith("_mb") else FLAT_COUNT
        found[measure] = trend(times_s, values, tolerance)
    return found


@contextmanager
def full_load(cluster: Cluster, requests: int) -> Iterator[threading.Event]:
    """`requests` clients that each ask again as soon as they are answered; the event is set should one fail."""
    stop, failed = threading.Event(), threading.Event()

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            prompt = rng.choices(range(VOCABULARY), k=rng.randint(1, 512))
            params = SamplingParams(max_tokens=rng.randint(1, 128), ignore_eos=True)
            try:
                cluster.generate([prompt], params)
            except Exception as error:  # told by the main thread, which ends the run
                print(f"a request failed: {error}", file=sys.stderr)
                failed.set()
                return

    clients = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in range(requests)]
    for client in clients:
        client.start()
    try:
        yield failed
    finally:
        stop.set()
        for client in clients:
            client.join()


def watch(pids: Mapping[str, int], seconds: float, period_s: float, failed: threading.Event) -> dict[str, list[Sample]]:
    """Samples by actor; ends early, with RuntimeError, when a request fails."""
    started_s = time.monotonic()
    samples: dict[str, list[Sample]] = {name: [] for name in pids}
    while (at_s := time.monotonic() - started_s) < seconds:
        for name, pid in pids.items():
            samples[name].append(sample(pid, at_s))
        if failed.wait(period_s):
            raise RuntimeError("the run ended early: a request failed")
    return samples


def measure(model: Path, args: argparse.Namespace) -> dict[str, list[Sample]]:
    raw = {
        "model": {"path": str(model)},
        "attention": {"replicas": args.attention},
        "ffn": {"expert_parallel": args.expert_parallel},
    }
    seconds = 60 * args.minutes
    with Cluster.start(parse_config(raw)) as cluster, full_load(cluster, args.requests) as failed:
        status = cluster.status()
        pids = {actor["id"]: int(actor["pid"]) for role in ("attention", "ffn") for actor in status[role]}
        return watch(pids | {"client": os.getpid()}, seconds, max(0.5, seconds / 200), failed)


def report(found: Mapping[str, Mapping[str, Trend]]) -> None:
    print("| process | measure | first | last | per hour | flat |\n|---|---|---|---|---|---|")
    for name, measures in found.items():
        for what, line in measures.items():
            flat = "yes" if line.flat else "**no**"
            print(f"| {name} | {what} | {line.first:.1f} | {line.last:.1f} | {line.per_hour:+.1f} | {flat} |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a step3-92m checkpoint (default: made in a temporary directory)")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=64, help="at once")
    parser.add_argument("--attention", type=int, default=2)
    parser.add_argument("--expert-parallel", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a short run, which cannot tell whether anything grows")
    args = parser.parse_args(argv)
    if args.quick:
        args.minutes, args.requests = 0.25, 8
    machine = hardware()
    with tempfile.TemporaryDirectory() as made:
        samples = measure(args.model or preset_in(Path(made) / "step3-92m"), args)
    found = {name: trends(of_one) for name, of_one in samples.items()}
    report(found)
    print(json.dumps(result(machine, args, found)))
    return 0 if args.quick or all(line.flat for lines in found.values() for line in lines.values()) else 1


def result(machine: str, args: argparse.Namespace, found: Mapping[str, Mapping[str, Trend]]) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in ("minutes", "requests", "attention", "expert_parallel")}
    lines = {name: {what: line._asdict() for what, line in lines.items()} for name, lines in found.items()}
    return {"benchmark": "soak", "date": date.today().isoformat(), "hardware": machine, **settings, "trends": lines}


if __name__ == "__main__":
    sys.exit(main())
