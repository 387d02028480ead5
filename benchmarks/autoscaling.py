"""What does each autoscaling policy pay for the same service: 99% of a bursty day's requests within both targets?

Every policy gets the settings that pay least among those tried, and so does the fixed ratio: the fewest ranks in any split. Simulated (`--config`), nothing is measured.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from afd_ray.autoscaling import load_policy
from afd_ray.config import load_config
from afd_ray.simulation.serving import Arrival, Outcome, Scene, draw, parse_synthetic, simulate
from benchmarks._machine import hardware

RESULTS = Path(__file__).parent / "results"
TRACE = "day:rate=0.6,prompt=200,output=1500,burst=2,burst_s=900,calm_s=3600,drift=3"
QUICK = "day:rate=0.6,prompt=1000,output=200,burst=2.5,duration_s=900"
WANTED = 0.99
MARGINS = (0.9, 0.8, 0.7, 0.6)
ONGOING = (24, 16, 12, 8)
RATIOS = ((1, 2), (1, 1), (2, 1))
"""Attention to FFN ranks, for the policy that keeps its ratio."""


class Try(NamedTuple):
    """A policy with its settings, and what came of it."""

    policy: str
    settings: str
    outcome: Outcome

    @property
    def holds(self) -> bool:
        return self.outcome.attainment >= WANTED


class Bench:
    """Runs on one trace, all of which are kept."""

    def __init__(self, config: str, trace: str, seed: int) -> None:
        self.tries: list[Try] = []
        self._config, self._trace, self._seed = config, parse_synthetic(trace), seed

    def run(self, policy: str, settings: str, *overrides: str) -> Try:
        scene = Scene.of(load_config(self._config, overrides))
        started_s = time.process_time()
        outcome = simulate(scene, self._arrivals(), load_policy(policy), name=policy, seed=self._seed)
        self.tries.append(Try(policy, settings, outcome))
        seconds = time.process_time() - started_s
        print(
            f"{policy} {settings}: {outcome.gpu_hours:.1f} GPU-hours, {outcome.attainment:.2%}, {seconds:.0f} s", file=sys.stderr
        )
        return self.tries[-1]

    def fixed(self, most: int) -> None:
        """The fewest ranks in all that hold, in any split: for each number of FFN ranks only splits that would be cheaper than the best so far."""
        best = 2 * most
        for ffn in sorted(range(1, most + 1), key=lambda count: abs(count - most // 2)):
            low, high = 1, min(most, best - ffn - 1)
            if high < 1 or not self._holds(high, ffn):
                continue
            while low < high:
                middle = (low + high) // 2
                if self._holds(middle, ffn):
                    high = middle
                else:
                    low = middle + 1
            best = high + ffn

    def cheapest(self, policy: str) -> Try | None:
        holding = [tried for tried in self.tries if tried.policy == policy and tried.holds]
        return min(holding, key=lambda tried: tried.outcome.gpu_hours, default=None)

    def _holds(self, attention: int, ffn: int) -> bool:
        counts = f"attention.replicas={attention}", f"ffn.expert_parallel={ffn}"
        return self.run("fixed", f"{attention}A{ffn}F", *counts).holds

    def _arrivals(self) -> Iterator[Arrival]:
        return draw(self._trace, self._seed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="simulate", help="a configuration with a `simulation` section")
    parser.add_argument("--trace", default=TRACE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=16, help="ranks of a role that a fixed ratio may have")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for autoscaling.md")
    parser.add_argument("--quick", action="store_true", help="a small run that writes nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.trace, args.most = QUICK, 4
    bench = Bench(args.config, args.trace, args.seed)
    sweep(bench, args.most, MARGINS[:1] if args.quick else MARGINS, ONGOING[:1] if args.quick else ONGOING)
    text = report(args, bench)
    print(text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "autoscaling.md").write_text(text + "\n")
    return 0


def sweep(bench: Bench, most: int, margins: Sequence[float], ongoing: Sequence[int]) -> None:
    for policy in ("balance", "predictive"):
        for margin in margins:
            bench.run(policy, f"margin {margin:g}", f"autoscaling.options.margin={margin}")
    bench.run("tpot", "", "attention.replicas=4")
    for attention, ffn in RATIOS:
        for requests in ongoing:
            per_attention = requests * ffn / max(attention, ffn)
            start = f"attention.replicas={4 * attention}", f"ffn.expert_parallel={4 * ffn}"
            setting = f"autoscaling.options.ongoing_per_attention={per_attention}"
            bench.run("queue", f"{per_attention:g} for each attention rank, {attention}:{ffn}", *start, setting)
    bench.fixed(most)


def report(args: argparse.Namespace, bench: Bench) -> str:
    command = (
        f"python -m benchmarks.autoscaling --config {args.config} --trace {args.trace} --seed {args.seed} --most {args.most}"
    )
    best = {policy: bench.cheapest(policy) for policy in ("fixed", "queue", "tpot", "balance", "predictive")}
    lines = [
        "# What does each policy pay for 99% of a bursty day's requests within both targets?",
        "",
        f"{date.today().isoformat()}, simulated on {hardware()}. `{command}`",
        "",
        f"Stage times and targets are those of `configs/{args.config}.yaml`: made up, so what counts is the comparison. For each policy the cheapest of the "
        "settings tried that holds; all of them are below.",
        "",
        *_table([tried for tried in best.values() if tried is not None], best["queue"], best["fixed"]),
        "",
        "## All that was tried",
        "",
        *_table(sorted(bench.tries, key=lambda t: (t.policy, t.outcome.gpu_hours)), best["queue"], best["fixed"]),
    ]
    return "\n".join(lines)


def _table(tries: Sequence[Try], queue: Try | None, fixed: Try | None) -> list[str]:
    head = ["policy", "settings", "GPU-hours", "of queue", "of fixed", "within targets", "TPOT p95 ms", "TTFT p95 ms", "resizes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for tried in tries:
        summary = tried.outcome.summary()
        shares = [_share(tried, base) for base in (queue, fixed)]
        latencies = [f"{summary[name]['p95']:.1f}" if summary[name] else "-" for name in ("tpot_ms", "ttft_ms")]
        hours, within = f"{tried.outcome.gpu_hours:.1f}", f"{tried.outcome.attainment:.2%}"
        lines.append(
            f"| {' | '.join([tried.policy, tried.settings, hours, *shares, within, *latencies, str(summary['resizes'])])} |"
        )
    return lines


def _share(tried: Try, base: Try | None) -> str:
    return f"{tried.outcome.gpu_hours / base.outcome.gpu_hours:.0%}" if base else "-"


if __name__ == "__main__":
    sys.exit(main())
