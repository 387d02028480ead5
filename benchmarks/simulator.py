"""Does the simulator tell what a live cluster does, on the same trace and under the same policy?

Stage times come from `actors.profiling`, as `afd-ray profile` writes them, taken on the very cluster. `real`: as this machine computes them; `paced`: actors that
last as long as a profile says, many on few cores; `autoscaling`: such actors under a policy, whose decisions are compared too.

Asked: TPOT p50 within 10%, p95 within 20%, throughput within 5%, and the same sequence of resizes, each within a control period.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from actors.cluster import Cluster, Generation
from actors.profiling import Started, profile
from afd_ray.autoscaling import Counts, load_policy
from afd_ray.config import Config, load_config
from afd_ray.models.checkpoint import write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.request import SamplingParams
from afd_ray.simulation.serving import Arrival, Scene, draw, parse_synthetic, simulate
from benchmarks._machine import hardware

RESULTS = Path(__file__).parent / "results"
ALLOWED = {"tpot_p50": 0.10, "tpot_p95": 0.20, "tokens_s": 0.05}
MOST_STREAMS = 400


class Part(NamedTuple):
    """Clusters of one kind, and what they serve."""

    settings: tuple[str, ...]
    shapes: tuple[Counts, ...]
    traces: Mapping[str, str]
    preset: str | None = None
    """Of a checkpoint with random weights; None: the bundled model."""


SMALL = "prompt=64,output=48,spread=0.3"
PARTS = {
    "real": Part(
        ("pipeline.micro_batches=2", "handoff.wire_dtype=bfloat16"),
        (Counts(1, 1), Counts(2, 1)),
        {
            "poisson": f"poisson:rate=4,duration_s=20,{SMALL}",
            "bursty": f"bursty:rate=4,duration_s=20,burst_s=4,calm_s=6,{SMALL}",
            "drift": "drift:rate=3,duration_s=20,prompt=200,output=48,drift=4,spread=0.3",
        },
        "step3-92m",
    ),
    "paced": Part(
        (
            "pipeline.micro_batches=2",
            "attention.pace={base_us: 3000, per_row_us: 60, per_context_token_us: 0.5}",
            "ffn.pace={base_us: 3000, per_row_us: 30}",
        ),
        (Counts(3, 2), Counts(6, 3)),
        {
            "poisson": f"poisson:rate=4,duration_s=20,{SMALL}",
            "bursty": f"bursty:rate=4,duration_s=20,burst_s=4,calm_s=6,{SMALL}",
            "drift": "drift:rate=3,duration_s=20,prompt=200,output=48,drift=4,spread=0.3",
        },
    ),
}


class Figures(NamedTuple):
    """What clients saw, or would have."""

    tpot_p50: float
    """ms, of a request's mean over its tokens after the first."""
    tpot_p95: float
    ttft_p50: float
    tokens_s: float
    """From the first arrival to the last token."""


class Row(NamedTuple):
    """One trace on one cluster."""

    part: str
    counts: Counts
    trace: str
    live: Figures
    simulated: Figures

    @property
    def deviations(self) -> dict[str, float]:
        return {name: getattr(self.simulated, name) / getattr(self.live, name) - 1 for name in ALLOWED}

    @property
    def holds(self) -> bool:
        return all(abs(value) <= ALLOWED[name] for name, value in self.deviations.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for simulator.md")
    parser.add_argument("--quick", action="store_true", help="one trace on one cluster, and nothing is written")
    args = parser.parse_args(argv)
    rows = [row for name in (args.parts[:1] if args.quick else args.parts) for row in run_part(name, args.seed, args.quick)]
    text = report(args, rows)
    print(text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "simulator.md").write_text(text + "\n")
    return 0


def run_part(name: str, seed: int, quick: bool) -> Iterator[Row]:
    part = PARTS[name]
    with tempfile.TemporaryDirectory() as directory:
        settings = [*part.settings, *checkpoint_of(part.preset, Path(directory))]
        for counts in part.shapes[:1] if quick else part.shapes:
            config = load_config("demo", [*settings, *ranks(counts)])
            with Cluster.start(config) as cluster:
                path = Path(directory) / f"{counts}.json"
                path.write_text(json.dumps(profile(Started(cluster), {"of": name})))
                print(path.read_text(), file=sys.stderr)
                for trace, text in islice(part.traces.items(), 1 if quick else None):
                    arrivals = list(draw(parse_synthetic(text), seed))
                    live = replay(cluster, arrivals)
                    yield told(Row(name, counts, trace, live, simulated(config, path, arrivals)))


def checkpoint_of(preset: str | None, directory: Path) -> list[str]:
    if preset is None:
        return []
    shape = PRESETS[preset]
    write_checkpoint(directory / preset, shape, random_tensors(shape))
    return [f"model.path={directory / preset}"]


def ranks(counts: Counts) -> list[str]:
    return [f"attention.replicas={counts.attention}", f"ffn.expert_parallel={counts.ffn}"]


def told(row: Row) -> Row:
    print(row, {name: f"{value:+.1%}" for name, value in row.deviations.items()}, file=sys.stderr, flush=True)
    return row


# --- live ------------------------------------------------------------------------------------------------------------------------


def replay(cluster: Cluster, arrivals: Sequence[Arrival]) -> Figures:
    """Every request at its time."""
    began_s = time.perf_counter()

    def serve(arrival: Arrival) -> tuple[float, Generation]:
        time.sleep(max(0.0, arrival.at_s - (time.perf_counter() - began_s)))
        submitted_s = time.perf_counter() - began_s
        params = SamplingParams(max_tokens=arrival.output, temperature=0.0, ignore_eos=True)
        (answer,) = cluster.generate([[7] * arrival.prompt], params)
        return submitted_s, answer

    with ThreadPoolExecutor(MOST_STREAMS) as streams:
        answers = list(streams.map(serve, arrivals))
    ended_s = max(at_s + answer.times_s[-1] for at_s, answer in answers)
    tokens = sum(len(answer.times_s) for _, answer in answers)
    means_ms = sorted(1000 * (t[-1] - t[0]) / (len(t) - 1) for _, a in answers if len(t := a.times_s) > 1)
    firsts_ms = sorted(1000 * answer.times_s[0] for _, answer in answers)
    return Figures(at(means_ms, 0.5), at(means_ms, 0.95), at(firsts_ms, 0.5), tokens / (ended_s - arrivals[0].at_s))


def at(ordered: Sequence[float], share: float) -> float:
    """By nearest rank."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# --- simulated ---------------------------------------------------------------------------------------------------------------------


def simulated(config: Config, path: Path, arrivals: Sequence[Arrival]) -> Figures:
    """The same cluster with the stage times of the file."""
    scene = Scene.of(config.model_copy(update={"simulation": config.simulation.model_copy(update={"profile": str(path)})}))
    outcome = simulate(scene, iter(arrivals), load_policy(config.autoscaling.policy))
    summary = outcome.summary()
    seconds = outcome.duration_s - arrivals[0].at_s
    return Figures(
        summary["tpot_ms"]["p50"], summary["tpot_ms"]["p95"], summary["ttft_ms"]["p50"], outcome.tally.tokens / seconds
    )


def report(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    command = f"python -m benchmarks.simulator --parts {' '.join(args.parts)} --seed {args.seed}"
    lines = [
        "# Does the simulator tell what a live cluster does?",
        "",
        f"{date.today().isoformat()}, {hardware()}. `{command}`",
        "",
        "Live, then simulated with the stage times that were profiled on that cluster just before; TPOT is a request's mean, ms.",
        "",
        "| cluster | trace | TPOT p50 | | | TPOT p95 | | | tokens/s | | | TTFT p50 | | holds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        live, there, off = row.live, row.simulated, row.deviations
        figures = [f"{getattr(live, n):.1f} | {getattr(there, n):.1f} | {off[n]:+.0%}" for n in ALLOWED]
        first = f"{live.ttft_p50:.0f} | {there.ttft_p50:.0f}"
        lines.append(
            f"| {row.part} {row.counts} | {row.trace} | {' | '.join(figures)} | {first} | {'yes' if row.holds else 'no'} |"
        )
    return "\n".join([*lines, "", f"{sum(row.holds for row in rows)} of {len(rows)} within the bounds."])


if __name__ == "__main__":
    sys.exit(main())
