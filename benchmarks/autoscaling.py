"""What does each autoscaling policy pay for the same service: 99% of a bursty day's requests within both targets?

Simulated (`--config`), nothing is measured. `balance` and `predictive` run as they are, with the settings that `--tune` found on other days; the stock
autoscaler and the fixed ratio get, for each day, the settings that pay least on that very day.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple

from afd_ray.autoscaling import load_policy
from afd_ray.config import load_config
from afd_ray.simulation.serving import Outcome, Scene, draw, parse_synthetic, simulate
from benchmarks._machine import hardware

RESULTS = Path(__file__).parent / "results"
TRACE = "day:rate=0.6,prompt=200,output=1500,burst=2,burst_s=900,calm_s=3600,drift=3"
QUICK = "day:rate=0.6,prompt=200,output=300,burst=2.5,duration_s=900"
WANTED = 0.99
OURS = ("balance", "predictive")
RATIOS = ((1, 1), (2, 3), (1, 2), (1, 3))
"""Attention to FFN ranks, for the policy that keeps its ratio."""
ONGOING = (4, 6, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24, 28)
"""Requests of an attention rank, for the policy that goes by them."""
TUNED = {"margin": (0.85, 0.9, 0.95), "deviations": (0.5, 1.0, 1.5), "shrink_after_s": (150, 300)}


class Day(NamedTuple):
    """What is served."""

    config: str
    trace: str
    seed: int


class Try(NamedTuple):
    """A policy with its settings, and what came of it."""

    day: Day
    policy: str
    settings: str
    outcome: Outcome

    @property
    def holds(self) -> bool:
        return self.outcome.attainment >= WANTED

    @property
    def gpu_hours(self) -> float:
        return self.outcome.gpu_hours


def attempt(day: Day, policy: str, settings: str = "as it is", *overrides: str) -> Try:
    """One policy over one day."""
    scene = Scene.of(load_config(day.config, overrides))
    started_s = time.process_time()
    outcome = simulate(scene, draw(parse_synthetic(day.trace), day.seed), load_policy(policy), name=policy, seed=day.seed)
    spent_s = time.process_time() - started_s
    said = f"{outcome.gpu_hours:.1f} GPU-hours, {outcome.attainment:.2%}, {spent_s:.0f} s"
    print(f"day {day.seed}, {policy} {settings}: {said}", file=sys.stderr)
    return Try(day, policy, settings, outcome)


def best_fixed(day: Day, most: int) -> list[Try]:
    """The fewest ranks in all that hold, in any split: for each number of FFN ranks only splits that would be cheaper than the best so far."""
    tries: list[Try] = []
    best = 2 * most
    for ffn in sorted(range(1, most + 1), key=lambda count: abs(count - most // 2)):
        highest = min(most, best - ffn - 1)

        def holds(attention: int, ffn: int = ffn) -> bool:
            counts = f"attention.replicas={attention}", f"ffn.expert_parallel={ffn}"
            tries.append(attempt(day, "fixed", f"{attention}A{ffn}F", *counts))
            return tries[-1].holds

        if highest >= 1 and holds(highest):
            best = ffn + _least(range(1, highest), holds, highest)
    return tries


def best_queue(day: Day, attention: int, ffn: int, ongoing: Sequence[int] = ONGOING) -> list[Try]:
    """The most requests for each attention rank that hold, with the ratio kept."""
    tries: list[Try] = []
    start = f"attention.replicas={2 * attention}", f"ffn.expert_parallel={2 * ffn}"

    def fails(place: int) -> bool:
        setting = f"autoscaling.options.ongoing_per_attention={ongoing[place]}"
        tries.append(attempt(day, "queue", f"{ongoing[place]} for each attention rank, {attention}:{ffn}", *start, setting))
        return not tries[-1].holds

    _least(range(len(ongoing)), fails, len(ongoing))
    return tries


def _least(candidates: range, holds: Callable[[int], bool], otherwise: int) -> int:
    """The first that holds, where all after it do too."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(candidates[middle]) else (middle + 1, high)
    return candidates[low] if low < len(candidates) else otherwise


def compare(day: Day, most: int, pool: ProcessPoolExecutor) -> list[Future[list[Try]]]:
    """Everything that a day is tried with."""
    whole = [pool.submit(best_fixed, day, most)]
    whole += [pool.submit(best_queue, day, *ratio) for ratio in RATIOS]
    return whole + [pool.submit(_alone, day, policy) for policy in (*OURS, "tpot")]


def tune(day: Day, pool: ProcessPoolExecutor) -> list[Future[list[Try]]]:
    """Our policies with every combination of TUNED."""
    combinations = [dict(zip(TUNED, values, strict=True)) for values in product(*TUNED.values())]
    return [pool.submit(_alone, day, policy, settings) for policy in OURS for settings in combinations]


def _alone(day: Day, policy: str, settings: dict[str, float] | None = None) -> list[Try]:
    if settings is None:
        return [attempt(day, policy)]
    named = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    return [attempt(day, policy, named, *(f"autoscaling.options.{name}={value}" for name, value in settings.items()))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="simulate", help="a configuration with a `simulation` section")
    parser.add_argument("--trace", default=TRACE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one day each")
    parser.add_argument("--most", type=int, default=16, help="ranks of a role that a fixed ratio may have")
    parser.add_argument("--tune", action="store_true", help="try settings of balance and predictive, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "autoscaling.md", help="the file to write")
    parser.add_argument("--quick", action="store_true", help="a small run that writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.trace, args.most, args.seeds = QUICK, 3, [0]
    days = [Day(args.config, args.trace, seed) for seed in args.seeds]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = [future for day in days for future in (tune(day, pool) if args.tune else compare(day, args.most, pool))]
        tries = [tried for future in running for tried in future.result()]
    text = "\n".join(_all_tried(tries)) if args.tune else report(args, days, tries)
    print(text)
    if not (args.quick or args.tune):
        args.out.write_text(text + "\n")
    return 0


def report(args: argparse.Namespace, days: Sequence[Day], tries: Sequence[Try]) -> str:
    seeds = " ".join(map(str, args.seeds))
    command = f"python -m benchmarks.autoscaling --config {args.config} --trace {args.trace} --seeds {seeds} --most {args.most}"
    lines = [
        "# What does each policy pay for 99% of a bursty day's requests within both targets?",
        "",
        f"{date.today().isoformat()}, simulated on {hardware()}. `{command}`",
        "",
        f"Stage times and targets are those of `configs/{args.config}.yaml`: made up, so what counts is the comparison. `queue` and `fixed` have the settings that "
        "pay least on the day in question, known afterwards; `balance` and `predictive` have none: their defaults were chosen on other days (`--tune`).",
    ]
    for day in days:
        ours = [tried for tried in tries if tried.day == day]
        best = [tried for policy in ("fixed", "queue", "tpot", *OURS) if (tried := _cheapest(ours, policy)) is not None]
        lines += ["", f"## Day {day.seed}", "", *_table(best, _cheapest(ours, "queue"), _cheapest(ours, "fixed"))]
    return "\n".join([*lines, "", "## All that was tried", "", *_all_tried(tries)])


def _cheapest(tries: Iterable[Try], policy: str) -> Try | None:
    """Of those that hold; of ours the one there is."""
    candidates = [tried for tried in tries if tried.policy == policy and (tried.holds or policy in (*OURS, "tpot"))]
    return min(candidates, key=lambda tried: tried.gpu_hours, default=None)


def _all_tried(tries: Iterable[Try]) -> list[str]:
    ordered = sorted(tries, key=lambda tried: (tried.day.seed, tried.policy, tried.gpu_hours))
    lines = ["| day | policy | settings | GPU-hours | within targets |", "|---|---|---|---|---|"]
    return lines + [
        f"| {tried.day.seed} | {tried.policy} | {tried.settings} | {tried.gpu_hours:.1f} | {tried.outcome.attainment:.2%} |"
        for tried in ordered
    ]


def _table(tries: Iterable[Try], queue: Try | None, fixed: Try | None) -> list[str]:
    head = ["policy", "settings", "GPU-hours", "of queue", "of fixed", "within targets", "TPOT p95 ms", "TTFT p95 ms", "resizes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for tried in tries:
        summary = tried.outcome.summary()
        shares = [_share(tried, base) for base in (queue, fixed)]
        latencies = [f"{summary[name]['p95']:.1f}" if summary[name] else "-" for name in ("tpot_ms", "ttft_ms")]
        figures = [f"{tried.gpu_hours:.1f}", *shares, f"{tried.outcome.attainment:.2%}", *latencies, str(summary["resizes"])]
        lines.append(f"| {' | '.join([tried.policy, tried.settings, *figures])} |")
    return lines


def _share(tried: Try, base: Try | None) -> str:
    return f"{tried.gpu_hours / base.gpu_hours:.0%}" if base else "-"


if __name__ == "__main__":
    sys.exit(main())
