"""How fast does the simulator run: a day of up to a million requests on up to 100 actors, on one core?"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from afd_ray.autoscaling import load_policy
from afd_ray.config import load_config
from afd_ray.simulation.serving import Scene, draw, parse_synthetic, simulate
from benchmarks._machine import hardware

RESULTS = Path(__file__).parent / "results"
DAY_S = 86_400
CURVE = ((10, 10_000), (10, 100_000), (30, 300_000), (100, 10_000), (100, 100_000), (100, 1_000_000))
"""Actors, two fifths of them attention, and requests in a day."""
QUICK = ((10, 1_000), (100, 5_000))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="fixed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for simulation.md")
    parser.add_argument("--quick", action="store_true", help="a small run that writes nothing")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        print(json.dumps(run(*args.one, args.policy)))
        return 0
    text = report(args.policy, [_apart(*point, args.policy) for point in (QUICK if args.quick else CURVE)])
    print(text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "simulation.md").write_text(text + "\n")
    return 0


def run(actors: int, requests: int, policy: str) -> dict[str, float]:
    """One day in this process."""
    attention = actors * 2 // 5
    scene = Scene.of(load_config("simulate", [f"attention.replicas={attention}", f"ffn.expert_parallel={actors - attention}"]))
    trace = parse_synthetic(f"diurnal:rate={requests / DAY_S},prompt=1000,output=300")
    started_s = time.process_time()
    outcome = simulate(scene, draw(trace, 0), load_policy(policy))
    cpu_s = time.process_time() - started_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tally = outcome.tally
    return {"actors": actors, "requests": tally.completions, "tokens": tally.tokens, "cpu_s": cpu_s, "peak_mb": peak_mb}


def _apart(actors: int, requests: int, policy: str) -> dict[str, float]:
    """In a process of its own, whose peak of memory is its own."""
    command = [sys.executable, "-m", "benchmarks.simulation", "--one", str(actors), str(requests), "--policy", policy]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(answer.stdout))


def report(policy: str, rows: Sequence[dict[str, float]]) -> str:
    lines = [
        "# How fast does the simulator run?",
        "",
        f"{date.today().isoformat()}, {hardware()}. A diurnal day, two fifths of the actors attention; prompts of 1,000 and answers of 300 tokens in the mean, policy "
        f"`{policy}`, one core. `python -m benchmarks.simulation --policy {policy}`",
        "",
        "Asked: a million requests on 100 actors in 300 s, and memory that does not grow with them.",
        "",
        "| actors | requests | tokens | CPU s | us a request | tokens a CPU second | peak memory MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        each_us, speed = row["cpu_s"] / row["requests"] * 1e6, row["tokens"] / row["cpu_s"]
        lines.append(
            f"| {row['actors']} | {row['requests']:,} | {row['tokens']:,} | {row['cpu_s']:.1f} | {each_us:.0f} | {speed:,.0f} | {row['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
