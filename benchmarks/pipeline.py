"""How much of the stages' time do 1 to 4 micro-batches fill? One attention and one FFN process, real step loops, several links.

Ideal: the busier half is never idle, by the stage times of both halves computing at once but unlinked. Formula: `pipeline.predicted_period` of
those stage times and a round trip over the same link. Bubble ratio: 1 - ideal / measured.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes

from afd_ray.engine.pipeline import predicted_period
from afd_ray.engine.stage_costs import StageTimes
from afd_ray.handoff.mesh import LinkKind
from afd_ray.models.checkpoint import write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from benchmarks import testbed
from benchmarks._machine import hardware
from benchmarks.pair.halves import Load
from benchmarks.pair.processes import ADDRESSES, Pair, pair, pair_of_hosts
from benchmarks.testbed.switch import Switch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
LOCAL = ("127.0.0.1", "127.0.0.1")
STEPS = 6
UNLINKED_S = 0.8
CONTEXTS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
BALANCED = 1.3
WANTED, NEAR = 0.90, 0.10


class Link(NamedTuple):
    """What carries the rows; `one_way_ms` None: no hosts in between."""

    name: str
    kind: LinkKind
    one_way_ms: float | None = None


class Sample(NamedTuple):
    """One run, in microseconds of a layer of all micro-batches."""

    times: StageTimes
    """Unlinked, of one micro-batch."""
    transfer: float
    period: float


class Row(NamedTuple):
    """The medians of one load, link and number of micro-batches."""

    load: Load
    link: Link
    slots: int
    attention: float
    ffn: float
    transfer: float
    ideal: float
    formula: float
    period: float

    @property
    def tokens_s(self) -> float:
        return self.load.rows / (self.period * 1e-6)

    @property
    def of_ideal(self) -> float:
        return self.ideal / self.period

    @property
    def formula_of_ideal(self) -> float:
        return self.ideal / self.formula

    @property
    def requirement(self) -> str:
        """What the project asks of this row."""
        slower, faster = max(self.attention, self.ffn), min(self.attention, self.ffn)
        hidden = self.link.one_way_ms is None or self.transfer <= slower
        if self.slots == 3 and hidden:
            return f">= {WANTED:.2f}" if slower <= BALANCED * faster else "-"
        return f"formula +- {NEAR:.2f}"

    @property
    def met(self) -> str:
        if self.requirement == "-":
            return "-"
        if self.requirement.startswith(">="):
            return "yes" if self.of_ideal >= WANTED else "no"
        return "yes" if abs(self.of_ideal - self.formula_of_ideal) <= NEAR else "no"


class Bench:
    """A checkpoint, its pairs of processes, and the runs with them."""

    def __init__(self, here: Pair, hosts: tuple[Pair, Switch] | None) -> None:
        self.here, self.hosts = here, hosts
        self.samples: dict[tuple[Load, Link, int], list[Sample]] = defaultdict(list)

    def load(self, load: Load) -> None:
        self.here.load(load)
        if self.hosts:
            self.hosts[0].load(load)

    def round(self, load: Load, links: Iterable[Link], slots: Sequence[int]) -> None:
        """Every count of micro-batches on every link once, each count beside its own ideal."""
        for count in slots:
            times = self.here.unlinked(count, UNLINKED_S)
            for link in links:
                period, transfer = self._linked(link, count)
                self.samples[load, link, count].append(Sample(times, transfer, period))
                print(f"{load} {link.name} {count}: {period:.0f} us", file=sys.stderr)

    def rows(self) -> list[Row]:
        return [_row(*key, samples) for key, samples in self.samples.items()]

    def _linked(self, link: Link, slots: int) -> tuple[float, float]:
        if link.one_way_ms is None:
            return self.here.linked(slots, link.kind, LOCAL, STEPS)
        assert self.hosts is not None
        pair, wire = self.hosts
        wire.link(*ADDRESSES, testbed.Link(delay_ms=link.one_way_ms))
        return pair.linked(slots, link.kind, ADDRESSES, STEPS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=96, help="sequences that decode, with real compute")
    parser.add_argument("--context", type=int, help="tokens behind each (default: what makes the halves equal)")
    parser.add_argument("--rounds", type=int, default=5, help="alternated runs of each case with real compute")
    parser.add_argument("--paced-rounds", type=int, default=3)
    parser.add_argument(
        "--stages-ms", type=float, nargs="*", default=[2.0, 5.0, 20.0], help="paced stages; none: real compute alone"
    )
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 2, 3, 4], help="micro-batches")
    parser.add_argument("--no-hosts", action="store_true", help="without network namespaces, which need root")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for pipeline.md and pipeline.png")
    parser.add_argument("--quick", action="store_true", help="a small run that writes nothing")
    args = parser.parse_args(argv)
    if not args.no_hosts and os.geteuid() != 0:
        print("hosts: network namespaces need root, left out", file=sys.stderr)
        args.no_hosts = True
    if args.quick:
        args.rows, args.context, args.rounds, args.paced_rounds, args.stages_ms, args.slots = 12, 64, 1, 1, [5.0], [1, 3]
    with tempfile.TemporaryDirectory() as made:
        real = measure(Path(made), "step3-92m", args, real_rounds)
        paced = measure(Path(made), "step3-tiny", args, paced_rounds) if args.stages_ms else []
    text = report(args, real, paced)
    print(text)
    if not args.quick:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "pipeline.md").write_text(text + "\n")
        plot(real, paced, args.out / "pipeline.png")
    return 0


def measure(
    directory: Path, preset: str, args: argparse.Namespace, rounds: Callable[[Bench, argparse.Namespace], None]
) -> list[Row]:
    config = PRESETS[preset]
    write_checkpoint(directory / preset, config, random_tensors(config, seed=0))
    with ExitStack() as stack:
        here = stack.enter_context(pair(directory / preset))
        hosts = None if args.no_hosts else stack.enter_context(pair_of_hosts(directory / preset))
        bench = Bench(here, hosts)
        rounds(bench, args)
    return bench.rows()


def real_rounds(bench: Bench, args: argparse.Namespace) -> None:
    """shm, tcp, and across hosts without a delay and with 1 ms each way."""
    context = args.context or balanced_context(bench.here, args.rows)
    links = [Link("shm", "shm"), Link("tcp", "tcp")]
    if bench.hosts:
        links += [Link("hosts", "tcp", 0.0), Link("hosts + 1 ms", "tcp", 1.0)]
    load = Load(args.rows, context)
    bench.load(load)
    for number in range(args.rounds):
        bench.round(load, links, _rotated(args.slots, number))


def paced_rounds(bench: Bench, args: argparse.Namespace) -> None:
    """Equal stages; delays such that both ways together are a half, one and two stages."""
    for number in range(args.paced_rounds):
        for stage_ms in args.stages_ms:
            links = [Link("shm", "shm")]
            if bench.hosts:
                links += [Link(f"hosts + {d:g} ms", "tcp", d) for d in (0.0, stage_ms / 4, stage_ms / 2, stage_ms)]
            load = Load(12, 16, stage_ms * 1000)
            bench.load(load)
            bench.round(load, links, _rotated(args.slots, number))


def balanced_context(pair: Pair, rows: int) -> int:
    """The context at which attention takes about as long as the FFN, with 3 micro-batches."""
    ratios = {}
    for context in CONTEXTS:
        pair.load(Load(rows, context))
        times = pair.unlinked(3, UNLINKED_S)
        ratios[context] = times.attention / times.ffn
        print(f"context {context}: attention {times.attention:.0f} us, FFN {times.ffn:.0f} us", file=sys.stderr)
        if times.attention > times.ffn:
            break
    return min(ratios, key=lambda context: abs(1 - max(ratios[context], 1 / ratios[context])))


def _rotated(slots: Sequence[int], number: int) -> list[int]:
    start = number % len(slots)
    return [*slots[start:], *slots[:start]]


def _row(load: Load, link: Link, slots: int, samples: Sequence[Sample]) -> Row:
    """Medians; the ideal and the formula of each run by its own stage times."""
    median = statistics.median
    ideals = [slots * max(s.times.attention, s.times.ffn) for s in samples]
    formulas = [predicted_period(s.times._replace(a2f=s.transfer / 2, f2a=s.transfer / 2), slots) for s in samples]
    return Row(
        load,
        link,
        slots,
        attention=median(s.times.attention for s in samples),
        ffn=median(s.times.ffn for s in samples),
        transfer=median(s.transfer for s in samples),
        ideal=median(ideals),
        formula=median(formulas),
        period=median(s.period for s in samples),
    )


def report(args: argparse.Namespace, real: list[Row], paced: list[Row]) -> str:
    counts = f"--rows {args.rows} --rounds {args.rounds} --paced-rounds {args.paced_rounds}"
    command = " ".join(["python -m benchmarks.pipeline", counts, "--stages-ms", *(f"{ms:g}" for ms in args.stages_ms)])
    head = [
        "# How much of the stages' time do 1 to 4 micro-batches fill?",
        f"{date.today().isoformat()}, {hardware()}. One attention and one FFN process without Ray, a core each. `{command}`",
        "Ideal: the busier half is never idle, by the stage times of both computing at once but unlinked, in the same round. Formula: "
        "max(M t_a, M t_f, t_a + t_f + transfer), the transfer a round trip over the same link. Times in us of a layer; t_a includes "
        "the head's share.",
        "![Bubble ratio](pipeline.png)",
        f"## Real compute: `step3-92m` in bfloat16, {args.rows} sequences, median of {args.rounds} alternated runs",
        _table(real),
    ]
    if paced:
        head += [
            f"## Paced stages, equal halves: `step3-tiny`, 12 sequences, median of {args.paced_rounds} alternated runs",
            _table(paced),
        ]
    return "\n\n".join(head)


def _table(rows: list[Row]) -> str:
    lines = [
        "| context or stage | link | M | t_a | t_f | transfer | ideal | period | tokens/s | of ideal | formula | bubble | asked | met |",
        "|" + "---|" * 14,
    ]
    for row in sorted(rows, key=lambda r: (r.load, r.link.one_way_ms or -1.0, r.link.name, r.slots)):
        what = f"{row.load.pace_us / 1000:g} ms" if row.load.pace_us else f"{row.load.context} tokens"
        figures = (row.attention, row.ffn, row.transfer, row.ideal, row.period, row.tokens_s)
        shares = f"{row.of_ideal:.2f} | {row.formula_of_ideal:.2f} | {1 - row.of_ideal:.2f}"
        micro = " | ".join(f"{figure:,.0f}" for figure in figures)
        lines.append(f"| {what} | {row.link.name} | {row.slots} | {micro} | {shares} | {row.requirement} | {row.met} |")
    return "\n".join(lines)


def plot(real: list[Row], paced: list[Row], path: Path) -> None:
    """Bubble ratio, with the formula as lines: by micro-batches for each link; where there are paced rows, by the transfer's length for each number of them."""
    panels = 2 if paced else 1
    figure, ((left, *others),) = plt.subplots(1, panels, figsize=(5.5 * panels, 4), sharey=True, squeeze=False)
    for name in dict.fromkeys(row.link.name for row in real):
        rows = sorted((row for row in real if row.link.name == name), key=lambda r: r.slots)
        _plot_bubbles(left, rows, [row.slots for row in rows], name)
    left.set(xlabel="micro-batches", ylabel="bubble ratio", title="Real compute (dashed: formula)", xticks=[1, 2, 3, 4])
    left.legend()
    for right in others:
        for slots in sorted({row.slots for row in paced}):
            rows = sorted((row for row in paced if row.slots == slots), key=_transfer_in_stages)
            _plot_bubbles(right, rows, [_transfer_in_stages(row) for row in rows], f"M = {slots}")
        right.set(xlabel="transfer both ways / stage", title="Paced, equal stages (dashed: formula)")
        right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _plot_bubbles(axes: Axes, rows: Sequence[Row], at: Sequence[float], label: str) -> None:
    (line,) = axes.plot(at, [1 - row.of_ideal for row in rows], "o", label=label)
    axes.plot(at, [1 - row.formula_of_ideal for row in rows], "--", color=line.get_color())


def _transfer_in_stages(row: Row) -> float:
    return row.transfer / max(row.attention, row.ffn)


if __name__ == "__main__":
    sys.exit(main())
