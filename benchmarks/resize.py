"""What does a live resize cost those who are being served? 20 in a row, on step3-tiny in float32, while clients stream and compare every token.

Asked: no request fails and every stream is the undisturbed one; attention actors stand still for one decode step and 100 ms at most; while a
resize is prepared steps slow down by 20% at most beyond what the cores that starting processes take explain.
"""

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from actors.commands.joining import use_own_token

use_own_token()

import psutil  # noqa: E402

from actors.serve import joined  # noqa: E402
from afd_ray.membership.steps import NAMES  # noqa: E402
from afd_ray.models.checkpoint import write_checkpoint  # noqa: E402
from afd_ray.models.presets import PRESETS, random_tensors  # noqa: E402
from benchmarks._machine import hardware  # noqa: E402
from benchmarks._server import served  # noqa: E402
from benchmarks.chaos.clients import Clients, asks, undisturbed  # noqa: E402
from benchmarks.chaos.processes import cpu_seconds, raylets, workers  # noqa: E402
from benchmarks.chaos.schedule import Shape  # noqa: E402
from benchmarks.chaos.watch import asked  # noqa: E402

MODEL = "step3-tiny"
START = Shape(1, 1, 1)
WAY = [
    *(Shape(attention, 1, 1) for attention in (3, 2, 1)),
    *(Shape(1, ffn, 1) for ffn in (2, 4, 3, 1)),
    *(Shape(attention, 1, 1) for attention in (3, 2, 1)),
    *(Shape(1, within, within) for within in (2, 4, 3, 1)),
    Shape(3, 2, 2),
    Shape(2, 4, 2),
    Shape(2, 2, 2),
    Shape(3, 4, 2),
    Shape(2, 2, 1),
    Shape(1, 1, 1),
]
"""Attention alone, FFN in expert parallel, in tensor parallel, both, and both roles at once; ends where it began."""
BEFORE_S, SETTLE_S = 3.0, 0.3
"""Of undisturbed load before each; and from a look that takes as long as a step, with the clients of this process standing still, to the next spell."""
PHASE_S, LOOK_S = 0.1, 0.5
"""How often the phase is asked for (while weights are loaded that asks every actor), and the processes are looked at: what is measured must not be
the measuring."""
PREPARING = tuple(NAMES[phase] for phase in ("provide", "load", "prepare", "connect"))
PAUSE_MS, SLOWER = 100.0, 0.20


class Spell(NamedTuple):
    """Some time, and what was served and the machine did in it."""

    seconds: float
    tokens: int
    """Of all answers."""
    cores: float
    """Busy, whoever kept them so."""
    starting_cores: float
    """Of them by worker processes of the cluster that were not serving at its beginning."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Row(NamedTuple):
    """One resize."""

    before: Shape
    to: Shape
    outcome: str
    pause_ms: float
    total_s: float
    longest_gap_ms: float
    """Between two tokens of any answer, from the ask to the end."""
    calm: Spell
    preparing: Spell

    @property
    def expected(self) -> float:
        """Tokens while it is prepared, had nothing changed but the cores that starting processes take."""
        left = min(1.0, ((os.cpu_count() or 1) - self.preparing.starting_cores) / self.calm.cores)
        return self.calm.tokens_per_s * left * self.preparing.seconds

    def step_ms(self, clients: int) -> float:
        """Between two tokens of an answer before it, where each of so many clients waits for one."""
        return 1000 * clients / self.calm.tokens_per_s

    @property
    def starts(self) -> bool:
        """Whether processes start."""
        return self.to.attention > self.before.attention or self.to.ffn > self.before.ffn


def slower(rows: Sequence[Row]) -> float:
    """By what share fewer tokens come while these are prepared than is expected."""
    return 1.0 - sum(row.preparing.tokens for row in rows) / sum(row.expected for row in rows)


class Meter:
    """Of a spell that begins with its making; `ray` are the raylets of the cluster, `serving` the workers that there are before it."""

    def __init__(self, clients: Clients, ray: Collection[int], serving: Collection[int]) -> None:
        self._clients, self._raylets, self._serving = clients, ray, serving
        self._cpu = cpu_seconds(ray)
        self._others: dict[int, float] = {}
        self.began_s = self._looked_s = time.monotonic()
        self._busy_s = busy_seconds()

    def look(self) -> None:
        """Now and then: of a process that has ended nothing is known any more."""
        if time.monotonic() - self._looked_s > LOOK_S:
            self._look()

    def read(self) -> Spell:
        """That it is over."""
        ended_s, busy_s = time.monotonic(), busy_seconds() - self._busy_s
        self._look()
        seconds = ended_s - self.began_s
        tokens = sum(at_s < ended_s for at_s, _ in gaps(self._clients, self.began_s))
        return Spell(seconds, tokens, busy_s / seconds, sum(self._others.values()) / seconds)

    def _look(self) -> None:
        self._looked_s = time.monotonic()
        seconds = cpu_seconds(self._raylets)
        self._others |= {pid: s - self._cpu.get(pid, 0.0) for pid, s in seconds.items() if pid not in self._serving}


def gaps(clients: Clients, since_s: float) -> list[tuple[float, float]]:
    """When each token since then came, and how many ms after the one before it."""
    pairs = (pair for answer in clients.since(since_s) for pair in itertools.pairwise(answer.times_s[1:]))
    return [(after, 1000 * (after - before)) for before, after in pairs if after > since_s]


def busy_seconds() -> float:
    """Of all cores of the machine since its start."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


async def resize(clients: Clients, before: Shape, to: Shape) -> Row:
    known = raylets(), {process.pid for processes in workers().values() for process in processes}
    await asyncio.sleep(SETTLE_S)
    meter = Meter(clients, *known)
    await asyncio.sleep(BEFORE_S)
    calm = meter.read()
    await asyncio.sleep(SETTLE_S)
    meter = Meter(clients, *known)
    scaling = asyncio.create_task(asked("scale", *to, None, timeout_s=None))
    await asyncio.sleep(PHASE_S)
    while not scaling.done() and ((doing := await asked("progress")).startswith(PREPARING) or doing == "ready"):
        meter.look()
        await asyncio.sleep(PHASE_S)
    preparing = meter.read()
    answer = await scaling
    longest_ms = max(gap_ms for _, gap_ms in gaps(clients, meter.began_s))
    return Row(before, to, answer["outcome"], answer["pause_ms"] or 0.0, answer["total_s"], longest_ms, calm, preparing)


async def measure(url: str, way: Sequence[Shape], args: argparse.Namespace) -> tuple[list[Row], Clients]:
    wanted = asks(args.seed, args.clients, PRESETS[MODEL].vocab_size, args.tokens)
    expected = await undisturbed(url, MODEL, wanted)
    clients = Clients(url, MODEL, wanted, expected, hung_after_s=args.patience)
    clients.start()
    rows = []
    for before, to in itertools.pairwise([START, *way]):
        rows.append(await resize(clients, before, to))
        print(table_line(rows[-1]), file=sys.stderr, flush=True)
    await clients.stop()
    return rows, clients


HEADER = """\
| from | to | outcome | prepare, s | pause, ms | total, s | longest gap of any answer, ms | tokens/s before | preparing | cores of starting processes | slower beyond them |
|---|---|---|---|---|---|---|---|---|---|---|"""


def table_line(row: Row) -> str:
    cells = [named(row.before), named(row.to), row.outcome, f"{row.preparing.seconds:.2f}", f"{row.pause_ms:.0f}"]
    cells += [
        f"{row.total_s:.2f}",
        f"{row.longest_gap_ms:.0f}",
        f"{row.calm.tokens_per_s:.0f}",
        f"{row.preparing.tokens_per_s:.0f}",
    ]
    cells += [f"{row.preparing.starting_cores:.2f}", f"{slower([row]):.0%}"]
    return "| " + " | ".join(cells) + " |"


def named(shape: Shape) -> str:
    parallel = f" (TP {shape.tensor_parallel})" if shape.tensor_parallel > 1 else ""
    return f"{shape.attention}A{shape.ffn}F{parallel}"


def verdicts(rows: Sequence[Row], clients: Clients) -> dict[str, bool]:
    """What is asked, and whether it held; what no resize was about is left out."""
    kinds = {"processes start": [row for row in rows if row.starts], "none start": [row for row in rows if not row.starts]}
    return {
        "every resize held": all(row.outcome == "committed" for row in rows),
        "every stream is the undisturbed one": not clients.mishaps,
        "no pause beyond a step and 100 ms": all(row.pause_ms <= row.step_ms(len(clients.asks)) + PAUSE_MS for row in rows),
        **{f"within 20% slower, where {kind}": slower(found) <= SLOWER for kind, found in kinds.items() if found},
    }


def account(rows: Sequence[Row], clients: Clients) -> str:
    held = "; ".join(f"{what}: {'yes' if holds else '**no**'}" for what, holds in verdicts(rows, clients).items())
    summary = f"{len(rows)} resizes, {clients.answered} answers, {clients.tokens} tokens. {held}."
    return "\n".join([summary, "", HEADER, *map(table_line, rows)])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=32, help="streaming at once")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--detect-timeout", type=float, default=1.0, help="failure.detect_timeout_s")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for a client's next token")
    parser.add_argument("--resizes", type=int, default=len(WAY), help="the first so many of the way")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="add the account to DIRECTORY/resize.md")
    parser.add_argument("--quick", action="store_true", help="three resizes")
    args = parser.parse_args(argv)
    if args.quick:
        args.resizes = 3
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every resize held and no client lost anything."""
    args = arguments(argv)
    machine = hardware()
    with tempfile.TemporaryDirectory() as made:
        model = Path(made) / MODEL
        write_checkpoint(model, PRESETS[MODEL], random_tensors(PRESETS[MODEL], seed=0))
        chosen = {"model.path": model, "model.name": MODEL, "attention.replicas": 1, "autoscaling.max.ffn": 8}
        chosen |= {"failure.detect_timeout_s": args.detect_timeout}
        settings = [text for key, value in chosen.items() for text in ("--set", f"{key}={value}")]
        with served(*settings) as server, joined(server.ray_address):
            rows, clients = asyncio.run(measure(server.url, WAY[: args.resizes], args))
    told = account(rows, clients)
    print(told)
    print(json.dumps(result(machine, args, rows, clients)))
    if args.write:
        file = args.write / "resize.md"
        before = file.read_text() if file.exists() else "# What does a live resize cost those who are being served?\n"
        file.write_text(f"{before}\n{date.today().isoformat()}, {machine}: `python -m benchmarks.resize`\n\n{told}\n")
    held = verdicts(rows, clients)
    return 0 if all(held[what] for what in list(held)[:2]) else 1


def result(machine: str, args: argparse.Namespace, rows: Sequence[Row], clients: Clients) -> dict[str, Any]:
    named_args = {name: getattr(args, name) for name in ("seed", "clients", "tokens", "detect_timeout")}
    return {
        "benchmark": "resize",
        "date": date.today().isoformat(),
        "hardware": machine,
        **named_args,
        "answered": clients.answered,
        "mishaps": [mishap._asdict() for mishap in clients.mishaps[:20]],
        "held": verdicts(rows, clients),
        "rows": [row._asdict() | {"slower": round(slower([row]), 3)} for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
