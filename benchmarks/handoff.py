"""What does a hand-off cost? Round trips between two processes for each link kind, beside the bare mechanism it stands on, in one run.

Bounds: a spinning ping-pong through shared memory, blocking sockets, gloo. All are measured in turns, and nothing is pinned to a core.
The links look for messages that are due as long as they do in a cluster whose hosts have a core for each actor.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from afd_ray.handoff.mesh import LinkKind
from benchmarks._machine import hardware
from benchmarks._ways import SIZES, WAYS, BareTcp, Link, Way

WAKES = 200
LINKS: tuple[LinkKind, ...] = ("shm", "tcp", "gloo")
RATIOS = {"shm": "bare_shm", "tcp": "bare_tcp", "tcp_parked": "bare_tcp", "gloo": "bare_gloo"}
COMMAND = "python -m benchmarks.handoff --write benchmarks/results/handoff.md"


# --- the other process --------------------------------------------------------------------------------------------------------


def follow(pipe: Connection, scratch: Path) -> None:
    """Take orders until there is none: (function name, its arguments)."""
    torch.set_num_threads(1)
    ways: dict[str, Way] = {}
    orders: dict[str, Callable[..., object]] = {
        "echo": echo,
        "wake": answer_wakes,
        "bare_wake": answer_bare_wakes,
        "idle": rest,
        "doze": doze,
    }
    with torch.inference_mode():
        while order := pipe.recv():
            what, name, *arguments = order
            if name not in ways:
                ways[name] = WAYS[name](1, pipe, scratch)
            orders[what](ways[name], *arguments)
    for way in ways.values():
        way.close()


def echo(way: Way, size_bytes: int, count: int) -> None:
    for _ in range(count):
        way.pong(size_bytes)


def answer_wakes(way: Link, count: int) -> None:
    """Answer each message with how many ns after it was sent this process had it."""
    for _ in range(count):
        message = way.next()
        late_ns = time.monotonic_ns() - message.header.sent_ns
        message.release()
        way.mesh.send(0, way.header._replace(step=late_ns))


def answer_bare_wakes(way: BareTcp, count: int) -> None:
    """As `answer_wakes`, for a process that sleeps in the kernel's own read."""
    for _ in range(count):
        sent_ns = way.hear()
        way.tell(time.monotonic_ns() - sent_ns)


def rest(way: Link, seconds: float) -> float:
    """Percent of a core that a wait of that length costs this process, all its threads together."""
    return cost_of(way.mesh.wait, seconds)


def doze(_way: Way, seconds: float) -> float:
    """As `rest`, for a process that sleeps: what its other threads cost."""
    return cost_of(time.sleep, seconds)


def cost_of(pause: Callable[[float], object], seconds: float) -> float:
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    pause(seconds)
    return 100 * (time.process_time() - began_cpu_s) / (time.monotonic() - began_s)


# --- this process -------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="bytes of a message, at most 4 MiB")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each way at each size")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of idling, each kind")
    parser.add_argument("--quick", action="store_true", help="a small run")
    parser.add_argument("--write", type=Path, help="write the tables here")
    args = parser.parse_args(argv)
    if args.quick:
        args.sizes, args.rounds, args.idle = [256, 65_536], 3, 0.5
    torch.set_num_threads(1)
    report = {"benchmark": "handoff", "date": date.today().isoformat(), "hardware": hardware(), "rounds": args.rounds}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch, torch.inference_mode():
        report |= measure(Path(scratch), args)
    print(json.dumps(report))
    if args.write:
        args.write.write_text(document(report))
    return 0


def measure(scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    other = context.Process(target=follow, args=(theirs, scratch))
    other.start()
    ways = {}
    for name, make in WAYS.items():
        pipe.send(("echo", name, 0, 0))
        ways[name] = make(0, pipe, scratch)
    times_us = {size: take_turns(ways, pipe, size, args.rounds) for size in args.sizes}
    kinds = {kind: ways[parked(kind)] for kind in LINKS}
    result = {
        "round_trip_us": {size: {name: spread(values) for name, values in by_way.items()} for size, by_way in times_us.items()},
        "wake_us": {"bare_tcp": spread(bare_wakes(ways["bare_tcp"], pipe))}
        | {kind: spread(wakes(way, pipe, parked(kind))) for kind, way in kinds.items()},
        "idle_percent": {"bare_tcp": dozing(ways["bare_tcp"], pipe, args.idle)}
        | {kind: idle(way, pipe, parked(kind), args.idle) for kind, way in kinds.items()},
    }
    for way in ways.values():
        way.close()
    pipe.send(None)
    other.join()
    return result


def parked(kind: str) -> str:
    """The way of that kind that sleeps while it waits."""
    return f"{kind}_parked" if f"{kind}_parked" in WAYS else kind


def take_turns(ways: dict[str, Way], pipe: Connection, size_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Round trips in us of every way, one after the other in each round; a turn's first fifth warms it up."""
    times_us: dict[str, list[float]] = {name: [] for name in ways}
    count = max(20, min(400, (8 << 20) // size_bytes))
    for _ in range(rounds):
        for name, way in ways.items():
            pipe.send(("echo", name, size_bytes, count))
            turn = [timed_us(way, size_bytes) for _ in range(count)]
            times_us[name] += turn[count // 5 :]
    return times_us


def timed_us(way: Way, size_bytes: int) -> float:
    began_s = time.perf_counter()
    way.ping(size_bytes)
    return (time.perf_counter() - began_s) * 1e6


def wakes(way: Link, pipe: Connection, name: str) -> list[float]:
    """How long, in us, from a send to a parked receiver until it has the message."""
    pipe.send(("wake", name, WAKES))
    late_us = []
    for _ in range(WAKES):
        time.sleep(2e-3)  # the receiver parks meanwhile
        way.mesh.send(1, way.header._replace(sent_ns=time.monotonic_ns()))
        answer = way.next()
        late_us.append(answer.header.step / 1000)
        answer.release()
    return late_us


def bare_wakes(way: BareTcp, pipe: Connection) -> list[float]:
    """As `wakes`, for a process that sleeps in the kernel's own read: what the machine allows."""
    pipe.send(("bare_wake", "bare_tcp", WAKES))
    late_us = []
    for _ in range(WAKES):
        time.sleep(2e-3)
        way.tell(time.monotonic_ns())
        late_us.append(way.hear() / 1000)
    return late_us


def idle(way: Link, pipe: Connection, name: str, seconds: float) -> float:
    pipe.send(("idle", name, seconds))
    return round(rest(way, seconds), 3)


def dozing(way: Way, pipe: Connection, seconds: float) -> float:
    pipe.send(("doze", "bare_tcp", seconds))
    return round(doze(way, seconds), 3)


def spread(values: list[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(values), 1), "p95": round(statistics.quantiles(values, n=20)[-1], 1)}


# --- what is written ----------------------------------------------------------------------------------------------------------


def document(report: dict[str, Any]) -> str:
    """The report as the page under results/."""
    by_size = report["round_trip_us"]
    names = list(WAYS)
    trips = [
        [shown(size), *(f"{by_way[name]['p50']:,} / {by_way[name]['p95']:,}" for name in names)]
        for size, by_way in by_size.items()
    ]
    ratios = [
        [shown(size), *(f"{by_way[name]['p50'] / by_way[bare]['p50']:.2f}" for name, bare in RATIOS.items())]
        for size, by_way in by_size.items()
    ]
    idle_percent = report["idle_percent"]
    rest = [[kind, f"{wake['p50']:,} / {wake['p95']:,}", idle_percent[kind]] for kind, wake in report["wake_us"].items()]
    parts = [
        "# What does a hand-off cost?",
        f"{report['date']}, {report['hardware']}. Two processes, pinned to nothing; every way in turn, {report['rounds']} rounds.",
        f"`{COMMAND}`",
        "Round trips in us, median / 95th percentile. `bare_shm`: counters and byte copies in shared memory, spinning; `bare_tcp`: blocking "
        "sockets; `bare_gloo`: ProcessGroupGloo. `shm`, `tcp`, `gloo`: the links while a step is in flight; `parked`: between steps.",
        table(["size", *names], trips),
        "Ratios of the medians to the bare mechanism.",
        table(["size", *(f"{name} / {bare}" for name, bare in RATIOS.items())], ratios),
        "Waking a parked receiver, us from send to receipt, and the CPU that a waiting process takes, percent of a core (`bare_tcp`: one that sleeps).",
        table(["link", "wake p50 / p95", "idle"], rest),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def shown(size_bytes: int) -> str:
    for unit, bytes_each in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= bytes_each:
            return f"{size_bytes // bytes_each} {unit}"
    return f"{size_bytes} B"


if __name__ == "__main__":
    sys.exit(main())
