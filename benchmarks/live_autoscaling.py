"""Does the live controller follow a load? Paced actors, so that more of them are more capacity on any machine: first the context doubles, then the rate, then nothing comes any more.

Asked: attention grows, then the FFN; TPOT p95 is under its target again within three control periods after the last growth of a phase; without load all shrinks
to the minimum; no role turns round more than once, when the load ends.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from actors.commands.admin import ask_url
from afd_ray.autoscaling.values import Counts
from afd_ray.models.checkpoint import write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from benchmarks._machine import hardware
from benchmarks._server import served
from benchmarks._streams import body, data_lines

RESULTS = Path(__file__).parent / "results"
MODEL = replace(PRESETS["step3-tiny"], moe_layers=frozenset(range(4)), moe_num_experts=16, moe_top_k=1)
"""Each row has one expert, so that routed FFN instances divide the rows among them."""
NAME = "paced"
TARGET_MS, PERIOD_S = 400.0, 5.0
PERIODS = 3
"""In which TPOT must be under its target again."""
MOST = Counts(4, 4)
CONFIG: dict[str, Any] = {
    "model": {"name": NAME},
    "attention": {"replicas": 1, "pace": {"base_us": 4000, "per_context_token_us": 24}},
    "ffn": {"dispatch": "routed", "pace": {"base_us": 2000, "per_row_us": 1000}},
    "pipeline": {"max_tokens_per_micro_batch": 12},
    "failure": {"detect_timeout_s": 5.0},
    "autoscaling": {
        "policy": "balance",
        "period_s": PERIOD_S,
        "tpot_target_ms": TARGET_MS,
        "ttft_target_ms": 10_000,
        "max": MOST._asdict(),
        "options": {"shrink_after_s": 40, "shrink_cooldown_s": 10, "grow_cooldown_s": 5, "deviations": 0, "margin": 0.85},
    },
}
OUTPUT = 80
"""Tokens of each answer."""


class Phase(NamedTuple):
    """Requests like clockwork for some time."""

    name: str
    seconds: float
    rate: float
    """Requests a second."""
    prompt: int


PHASES = (
    Phase("as at first", 40, 0.6, 60),
    Phase("context doubled", 90, 0.6, 160),
    Phase("rate doubled", 90, 1.2, 160),
    Phase("no load", 100, 0.0, 0),
)


class Change(NamedTuple):
    """The policy's resize that has committed."""

    asked_s: float
    """Seconds since the load began, as all times here."""
    done_s: float
    before: Counts
    to: Counts
    reason: str


class Run(NamedTuple):
    """What was seen."""

    phases: Sequence[Phase]
    gaps: list[tuple[float, float]]
    """When each token after an answer's first came, and how many ms after the one before it."""
    answers: int
    failed: list[str]
    changes: list[Change]
    end_s: float

    def starts_s(self) -> list[float]:
        """Of the phases."""
        return [sum(phase.seconds for phase in self.phases[:number]) for number in range(len(self.phases))]

    def p95_ms(self, start_s: float, end_s: float) -> float | None:
        """TPOT of the tokens that came in between."""
        values = sorted(gap_ms for at_s, gap_ms in self.gaps if start_s <= at_s < end_s)
        return values[min(len(values) - 1, len(values) * 95 // 100)] if values else None

    def counts_at(self, at_s: float) -> Counts:
        return next((change.to for change in reversed(self.changes) if change.done_s <= at_s), Counts(1, 1))

    @property
    def reversals(self) -> int:
        """How often the ranks of a role went the other way than the time before, of the role that did most: once when all shrinks in the end."""
        steps = [[change.to[role] - change.before[role] for change in self.changes] for role in (0, 1)]
        moves = [[step for step in of_role if step] for of_role in steps]
        return max(sum(a * b < 0 for a, b in itertools.pairwise(of_role)) for of_role in moves)


class Load:
    """Open-loop clients: a request is sent when it is due, whatever became of those before it."""

    def __init__(self, url: str, seed: int) -> None:
        self.gaps: list[tuple[float, float]] = []
        self.answers = 0
        self.failed: list[str] = []
        self._url, self._random = url, random.Random(seed)
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, phases: Sequence[Phase]) -> float:
        """All phases; gives when the first one began, since 1970."""
        self._began_s, began_s = time.monotonic(), time.time()
        end_s = 0.0
        for phase in phases:
            print(phase.name, file=sys.stderr, flush=True)
            due_s, end_s = end_s, end_s + phase.seconds
            while phase.rate and due_s < end_s:
                await self._until(due_s)
                self._tasks.append(asyncio.create_task(self._ask(phase.prompt)))
                due_s += 1 / phase.rate
            await self._until(end_s)
        await asyncio.gather(*self._tasks)
        return began_s

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._began_s + at_s - time.monotonic()))

    async def _ask(self, prompt: int) -> None:
        ids = self._random.choices(range(MODEL.vocab_size), k=prompt)
        before_s = None
        try:
            async for line in data_lines(self._url, body(NAME, ids, OUTPUT)):
                at_s = time.monotonic() - self._began_s
                for _ in range(sum(len(choice.get("token_ids") or ()) for choice in json.loads(line)["choices"])):
                    if before_s is not None:
                        self.gaps.append((at_s, 1000 * (at_s - before_s)))
                    before_s = at_s
        except (OSError, RuntimeError) as error:
            self.failed.append(str(error))
        self.answers += 1


def run(phases: Sequence[Phase], seed: int) -> Run:
    with tempfile.TemporaryDirectory() as made:
        model, config = Path(made) / NAME, Path(made) / "config.yaml"
        write_checkpoint(model, MODEL, random_tensors(MODEL, seed=0))
        config.write_text(yaml.safe_dump(CONFIG | {"model": {"path": str(model), "name": NAME}}))
        with served(str(config)) as server:
            load = Load(server.url, seed)
            began_s = asyncio.run(load.run(phases))
            decisions = ask_url(server.url, "/admin/decisions", None, None, 30.0)["decisions"]
    end_s = sum(phase.seconds for phase in phases)
    return Run(phases, load.gaps, load.answers, load.failed, changes_of(decisions, began_s), end_s)


def changes_of(decisions: Sequence[dict[str, Any]], began_s: float) -> list[Change]:
    """The resizes that committed, in their order."""
    changes, asked = [], None
    for entry in decisions:
        if entry["action"] == "resize":
            asked = entry
        elif entry["action"] == "committed" and asked is not None:
            at_s = (asked["at_s"] - began_s, entry["at_s"] - began_s)
            changes.append(Change(*at_s, Counts(**entry["before"]), Counts(**entry["wanted"]), asked["reason"]))
    return changes


def verdicts(seen: Run) -> dict[str, bool]:
    """What is asked, and whether it held."""
    _, context_s, rate_s, rest_s = seen.starts_s()
    before, context, rate = (seen.counts_at(at_s) for at_s in (context_s, rate_s, rest_s))
    return {
        "no request failed": not seen.failed,
        "context doubled: attention grew": context.attention > before.attention,
        "rate doubled: the FFN grew": rate.ffn > context.ffn,
        f"TPOT p95 under target within {PERIODS} periods": all(recovered(seen, start, stop) for start, stop in loaded(seen)),
        "at the minimum without load": seen.counts_at(seen.end_s) == Counts(1, 1),
        "no role turned round more than once": seen.reversals <= 1,
    }


def loaded(seen: Run) -> list[tuple[float, float]]:
    """When the phases with load began and ended."""
    starts = seen.starts_s()
    return [(start, start + phase.seconds) for start, phase in zip(starts, seen.phases, strict=True) if phase.rate]


def recovered(seen: Run, start_s: float, stop_s: float) -> bool:
    """From PERIODS periods after the phase's last growth on, its last period included."""
    done = [change.done_s for change in seen.changes if start_s <= change.done_s < stop_s and change.to >= change.before]
    since_s = (done[-1] if done else start_s) + (PERIODS - 1) * PERIOD_S
    p95_ms = seen.p95_ms(since_s, since_s + PERIOD_S)
    return p95_ms is not None and p95_ms <= TARGET_MS


def report(seen: Run, machine: str) -> str:
    held = [f"- {what}: {'yes' if holds else '**no**'}" for what, holds in verdicts(seen).items()]
    lines = [
        "# Does the live controller follow a load?",
        "",
        f"{date.today().isoformat()}, {machine}. `python -m benchmarks.live_autoscaling`",
        "",
        f"Paced actors (`{json.dumps({role: CONFIG[role]['pace'] for role in ('attention', 'ffn')})}`, {MODEL.num_hidden_layers} layers, one expert for each row), "
        f"policy `balance`, TPOT target {TARGET_MS:g} ms, a decision every {PERIOD_S:g} s, answers of {OUTPUT} tokens. {seen.answers} requests, {len(seen.failed)} failed.",
        "",
        *held,
        "",
        "| phase | requests/s | prompt | ranks at its end | TPOT p95 of its last three periods, ms |",
        "|---|---|---|---|---|",
        *(_phase_line(seen, phase, start) for phase, start in zip(seen.phases, seen.starts_s(), strict=True)),
        "",
        "| at, s | resize | in, s | why | TPOT p95 of the three periods after it, ms |",
        "|---|---|---|---|---|",
        *(_change_line(seen, change) for change in seen.changes),
        "",
        "![TPOT against its target, and ranks](live_autoscaling.png)",
    ]
    return "\n".join(lines)


def _phase_line(seen: Run, phase: Phase, start_s: float) -> str:
    end_s = start_s + phase.seconds
    p95_ms = seen.p95_ms(end_s - 3 * PERIOD_S, end_s) if phase.rate else None
    return f"| {phase.name} | {phase.rate:g} | {phase.prompt or '-'} | {seen.counts_at(end_s)} | {_ms(p95_ms)} |"


def _change_line(seen: Run, change: Change) -> str:
    periods = [change.done_s + number * PERIOD_S for number in range(PERIODS)]
    after = ", ".join(_ms(seen.p95_ms(at_s, at_s + PERIOD_S)) for at_s in periods)
    took_s = change.done_s - change.asked_s
    return f"| {change.asked_s:.0f} | {change.before} to {change.to} | {took_s:.1f} | {change.reason} | {after} |"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def draw(seen: Run, file: Path) -> None:
    """TPOT p95 of each period against its target, and below it the ranks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    tpot, ranks = figure.subplots(2, 1, sharex=True)
    ends = [PERIOD_S * number for number in range(1, int(seen.end_s / PERIOD_S) + 1)]
    points = [(at_s, p95) for at_s in ends if (p95 := seen.p95_ms(at_s - PERIOD_S, at_s)) is not None]
    tpot.plot(*zip(*points, strict=True), marker=".", label="TPOT p95 of a period")
    tpot.axhline(TARGET_MS, color="gray", linestyle="--", label="target")
    tpot.set(ylabel="ms", ylim=(0, None))
    seconds = list(range(int(seen.end_s) + 1))
    for role, name in enumerate(("attention", "FFN")):
        ranks.plot(seconds, [seen.counts_at(at_s)[role] for at_s in seconds], drawstyle="steps-post", label=name)
    ranks.set(xlabel="seconds", ylabel="ranks", ylim=(0, max(MOST) + 0.5))
    for axes in (tpot, ranks):
        for start_s, phase in zip(seen.starts_s(), seen.phases, strict=True):
            axes.axvline(start_s, color="lightgray")
            axes.annotate(
                phase.name, (start_s, 1), xycoords=("data", "axes fraction"), va="top", xytext=(3, -3), textcoords="offset points"
            )
        axes.legend(loc="lower right")
    figure.savefig(file, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all that is asked held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for live_autoscaling.md and .png")
    args = parser.parse_args(argv)
    machine = hardware()
    seen = run(PHASES, args.seed)
    text = report(seen, machine)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "live_autoscaling.md").write_text(text + "\n")
    draw(seen, args.out / "live_autoscaling.png")
    return 0 if all(verdicts(seen).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
