"""Does the simulator tell what a live cluster does, on the same trace and under the same policy?

`real`: stages last as long as this machine computes; `paced`: as long as a pace says, many actors on few cores. Stage times of both come from `actors.profiling`, as
`afd-ray profile` writes them, taken on the very cluster. `resizes`: paced actors under a policy, whose decisions are compared too (`_resizes`).

Asked: TPOT p50 within 10%, p95 within 20%, throughput within 5%, and the same sequence of resizes, each within a control period.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from actors.cluster import Cluster
from actors.profiling import Profiler, Started
from afd_ray.autoscaling import Counts, load_policy
from afd_ray.config import Config, load_config
from afd_ray.models.checkpoint import write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.simulation.serving import Arrival, Scene, draw, parse_synthetic, simulate
from benchmarks import _resizes
from benchmarks._machine import hardware
from benchmarks._replay import ALLOWED, Figures, deviations, replay, within
from benchmarks._resizes import Scaled

RESULTS = Path(__file__).parent / "results"
NAMES = {"tpot_p50": "TPOT p50, ms", "tpot_p95": "TPOT p95, ms", "tokens_s": "tokens/s"}


class Part(NamedTuple):
    """Clusters of one kind, and what they serve."""

    settings: tuple[str, ...]
    shapes: tuple[Counts, ...]
    traces: Mapping[str, str]
    preset: str | None = None
    """Of a checkpoint with random weights; None: the bundled model."""
    replays: int = 1
    """Of each trace, with a profile before, between and after; what they saw is averaged."""


SMALL = "prompt=64,output=48,spread=0.3"
PARTS = {
    "real": Part(
        ("pipeline.micro_batches=2", "handoff.wire_dtype=bfloat16"),
        (Counts(1, 1), Counts(2, 1)),
        {
            # So many that actors are at work most of the time: what it takes to wake up one that is not, no profile says.
            "poisson": f"poisson:rate=10,duration_s=20,{SMALL}",
            "bursty": f"bursty:rate=8,duration_s=20,burst_s=4,calm_s=6,{SMALL}",
            "drift": "drift:rate=4,duration_s=20,prompt=200,output=48,drift=4,spread=0.3",
        },
        "step3-92m",
        replays=2,
    ),
    "paced": Part(
        # So slow that what nine actors compute besides is little on two cores: who waits for a core is not on schedule.
        (
            "pipeline.micro_batches=2",
            "attention.pace={base_us: 12000, per_row_us: 240, per_context_token_us: 2}",
            "ffn.pace={base_us: 12000, per_row_us: 120}",
        ),
        (Counts(3, 2), Counts(6, 3)),
        {
            "poisson": f"poisson:rate=1.5,duration_s=40,{SMALL}",
            "bursty": f"bursty:rate=1.5,duration_s=40,burst_s=8,calm_s=12,{SMALL}",
            "drift": "drift:rate=1,duration_s=40,prompt=200,output=48,drift=4,spread=0.3",
        },
    ),
}


class Row(NamedTuple):
    """One trace on one cluster."""

    part: str
    counts: Counts
    trace: str
    live: Figures
    again: Figures
    """The last replay alone: how far the live cluster is from itself."""
    simulated: Figures
    """Every layer of every micro-batch."""
    by_rounds: Figures
    """The same in closed form, as days are simulated; not judged."""

    @property
    def deviations(self) -> dict[str, float]:
        return deviations(self.simulated, self.live)

    @property
    def holds(self) -> bool:
        return within(self.simulated, self.live)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*PARTS, "resizes"]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for simulator.md")
    parser.add_argument("--quick", action="store_true", help="one trace of each part on one cluster, and nothing is written")
    args = parser.parse_args(argv)
    rows = [row for name in args.parts if name in PARTS for row in run_part(name, args.seed, args.quick)]
    scaled: list[Scaled] = []
    if "resizes" in args.parts:
        scaled += map(told_of, _resizes.run_cases(args.quick))
    text = report(args, rows, scaled)
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
                profiler, served = Profiler(Started(cluster)), []
                for trace, text in islice(part.traces.items(), 1 if quick else None):
                    arrivals = list(draw(parse_synthetic(text), seed))
                    lives = []
                    for _ in range(part.replays):
                        measure(profiler)
                        lives.append(replay(cluster, arrivals))
                    served.append((trace, arrivals, lives))
                measure(profiler)
                path.write_text(json.dumps(profiler.dump({"of": name})))
                print(path.read_text(), file=sys.stderr)
            for trace, arrivals, lives in served:
                figures = (simulated(config, path, arrivals, detail) for detail in ("layers", "rounds"))
                yield told(Row(name, counts, trace, Figures(*map(fmean, zip(*lives, strict=True))), lives[-1], *figures))


def measure(profiler: Profiler) -> None:
    """A machine is not as fast at one time as at another: stages are profiled before, between and after the traces."""
    for _ in profiler.round():
        pass


def checkpoint_of(preset: str | None, directory: Path) -> list[str]:
    if preset is None:
        return []
    shape = PRESETS[preset]
    write_checkpoint(directory / preset, shape, random_tensors(shape, seed=0))
    return [f"model.path={directory / preset}"]


def ranks(counts: Counts) -> list[str]:
    return [f"attention.replicas={counts.attention}", f"ffn.expert_parallel={counts.ffn}"]


def told(row: Row) -> Row:
    print(row, {name: f"{value:+.1%}" for name, value in row.deviations.items()}, file=sys.stderr, flush=True)
    return row


def told_of(scaled: Scaled) -> Scaled:
    moves = (", ".join(map(str, moves)) for moves in (scaled.live_moves, scaled.simulated_moves))
    print(f"{scaled.policy}, {scaled.trace}: live {next(moves)}; simulated {next(moves)}", file=sys.stderr, flush=True)
    return scaled


def simulated(config: Config, path: Path, arrivals: Sequence[Arrival], detail: str) -> Figures:
    """The same cluster with the stage times of the file."""
    simulation = config.simulation.model_copy(update={"profile": str(path), "detail": detail})
    scene = Scene.of(config.model_copy(update={"simulation": simulation}))
    return Figures.of(simulate(scene, iter(arrivals), load_policy(config.autoscaling.policy)), arrivals[0].at_s)


# --- report ------------------------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, rows: Sequence[Row], scaled: Sequence[Scaled]) -> str:
    command = f"python -m benchmarks.simulator --parts {' '.join(args.parts)} --seed {args.seed}"
    lines = ["# Does the simulator tell what a live cluster does?", "", f"{date.today().isoformat()}, {hardware()}. `{command}`"]
    lines += [*_of_latencies(rows)] if rows else []
    lines += [*_of_resizes(scaled)] if scaled else []
    return "\n".join(lines)


def _of_latencies(rows: Sequence[Row]) -> Iterator[str]:
    asked = ", ".join(f"{name} within {share:.0%}" for name, share in zip(NAMES.values(), ALLOWED.values(), strict=True))
    yield from ("", "## On the same trace", "")
    yield (
        "Live, then simulated layer by layer (`simulation.detail: layers`) with the stage times that were profiled on that cluster before, between and after; TPOT is a request's mean. "
        f"Asked: {asked}. Real stages are replayed twice: live is the mean, and `itself` how far the second replay is from it at TPOT p50. "
        "The last columns are the same three by rounds, in closed form, which is not judged here."
    )
    yield ""
    yield f"| cluster | trace | {' | | | '.join(NAMES.values())} | | | TTFT p50, ms | | holds | itself | by rounds | | |"
    yield f"{18 * '|---'}|"
    for row in rows:
        first = f"{row.live.ttft_p50:.0f} | {row.simulated.ttft_p50:.0f}"
        again = f"{row.again.tpot_p50 / row.live.tpot_p50 - 1:+.0%}" if PARTS[row.part].replays > 1 else "-"
        rounds = " | ".join(f"{share:+.0%}" for share in deviations(row.by_rounds, row.live).values())
        cells = [f"{row.part} {row.counts}", row.trace, *_figures(row.live, row.simulated), first, _yes(row.holds), again, rounds]
        yield f"| {' | '.join(cells)} |"
    yield from ("", f"{sum(row.holds for row in rows)} of {len(rows)} within the bounds.")


def _of_resizes(scaled: Sequence[Scaled]) -> Iterator[str]:
    yield from ("", "## Under the same policy", "")
    yield (
        f"Paced actors from 1A1F on, a decision every {_resizes.PERIOD_S:g} s, on traces whose steps are well apart. Stage times are those of a profile of 1A1F; how long a growth and a "
        "reduction took is told from the live run. Asked: the same sequence of resizes, each within a period, and the figures as above."
    )
    yield ""
    yield f"| policy | trace | resizes, live | simulated | same | most apart, s | {' | | | '.join(NAMES.values())} | | | holds |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for one in scaled:
        moves = ["; ".join(map(str, moves)) or "none" for moves in (one.live_moves, one.simulated_moves)]
        apart = f"{one.apart_s:.1f}" if one.same else "-"
        cells = [one.policy, one.trace, *moves, _yes(one.same), apart, *_figures(one.live, one.simulated), _yes(one.holds)]
        yield f"| {' | '.join(cells)} |"
    alike, every = sum(one.alike for one in scaled), len(scaled)
    yield from (
        "",
        f"{alike} of {every} with the same resizes, {sum(one.holds for one in scaled)} of {every} with all that is asked.",
    )


def _figures(live: Figures, simulated: Figures) -> list[str]:
    off = deviations(simulated, live)
    return [f"{getattr(live, name):.1f} | {getattr(simulated, name):.1f} | {off[name]:+.0%}" for name in ALLOWED]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


if __name__ == "__main__":
    sys.exit(main())
