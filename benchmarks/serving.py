"""How fast does it serve, beside vLLM's CPU build and plain torch? step3-92m, the engines' own APIs, the same prompts and cores, in turn.

All requests of a row are submitted at once. Compared is tokens/s over the whole row, prefill included.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from afd_ray.telemetry import quantiles_ms
from benchmarks._machine import hardware
from benchmarks.overlap import preset_in
from benchmarks.peers.catalogue import ENGINES
from benchmarks.peers.process import Engine
from benchmarks.peers.protocol import Answer, EngineError, Job

REQUESTS = (1, 8, 32, 96, 192)
CONTEXTS = (128, 1024)
PEER = "vllm"
"""What ratios are taken to: the better of the engines whose name begins so."""


class Load(NamedTuple):
    requests: int
    context: int
    """Tokens of each prompt."""
    tokens: int
    """New tokens a request."""

    def job(self, vocabulary: int = 4096) -> Job:
        """Prompts of random tokens, the same for every engine and different in every row."""
        rng = random.Random(f"{self.requests} x {self.context}")
        return Job([rng.choices(range(vocabulary), k=self.context) for _ in range(self.requests)], self.tokens)


class Row(NamedTuple):
    """One engine under one load; times in ms."""

    engine: str
    load: Load
    tokens_per_s: float
    decode_tokens_per_s: float | None
    """After the last request's first token; None when less than a quarter of all tokens came then."""
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    """Gaps between the tokens of a request."""


def row(engine: str, load: Load, answer: Answer) -> Row:
    """The figures of one answer; raises EngineError when a token is missing."""
    times_s = answer.times_s
    if [len(times) for times in times_s] != [load.tokens] * load.requests:
        raise EngineError(f"{engine} must answer {load.requests} x {load.tokens} tokens")
    end_s = max(times[-1] for times in times_s)
    gaps_s = [after - before for times in times_s for before, after in itertools.pairwise(times)]
    return Row(
        engine,
        load,
        round(load.requests * load.tokens / end_s, 1),
        decode_rate(times_s),
        quantiles_ms(1000 * times[0] for times in times_s) or {},
        quantiles_ms(1000 * gap for gap in gaps_s) or {},
    )


def decode_rate(times_s: Sequence[Sequence[float]]) -> float | None:
    """Tokens/s after the last request's first token; None when less than a quarter of all tokens came then."""
    prefilled_s = max(times[0] for times in times_s)
    end_s = max(times[-1] for times in times_s)
    after = sum(time > prefilled_s for times in times_s for time in times)
    return round(after / (end_s - prefilled_s), 1) if 4 * after >= sum(map(len, times_s)) else None


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Tokens/s of each engine over the better vLLM's, under one load; empty without vLLM."""
    peer = max((r.tokens_per_s for r in rows if r.engine.startswith(PEER)), default=None)
    return {r.engine: round(r.tokens_per_s / peer, 2) for r in rows} if peer else {}


def medians(rows: Sequence[Row]) -> list[Row]:
    """Of all rounds of an engine under a load, the one with the median tokens/s (of an even number the lower)."""
    rounds: dict[tuple[str, Load], list[Row]] = {}
    for entry in rows:
        rounds.setdefault((entry.engine, entry.load), []).append(entry)
    return [sorted(those, key=lambda one: one.tokens_per_s)[(len(those) - 1) // 2] for those in rounds.values()]


def measure(names: Sequence[str], loads: Sequence[Load], checkpoint: Path, threads: int) -> Iterator[Row]:
    """Each engine alone on the machine, under every load: an engine that idles beside another takes 15% of it."""
    for name in names:
        try:
            with started(name, checkpoint, threads) as engine:
                for load in loads:
                    yield row(name, load, engine.generate(load.job()))
        except EngineError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)


@contextmanager
def started(name: str, checkpoint: Path, threads: int) -> Iterator[Engine]:
    """An engine, warmed up; raises EngineError when it cannot run here."""
    print(f"starting {name}", file=sys.stderr)
    engine = Engine(ENGINES[name](checkpoint, threads))
    try:
        engine.await_ready()
        warm_up(engine)
        yield engine
    finally:
        engine.close()


def warm_up(engine: Engine) -> None:
    """Both phases, at several batch sizes and context lengths, with prompts of no row."""
    for requests, context in ((1, 32), (8, 128), (32, 100), (4, 1024)):
        engine.generate(Load(requests, context, 16).job())


HEADER = """\
| requests | context | engine | tokens/s | ratio | decode tokens/s | TTFT p50 | p95 | p99 | TPOT p50 | p95 | p99 |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def table_line(row: Row, ratio: float | None) -> str:
    ttft, tpot = row.ttft_ms, row.tpot_ms
    cells: list[object] = [row.load.requests, row.load.context, row.engine, f"{row.tokens_per_s:,.0f}"]
    cells += ["-" if ratio is None else f"{ratio:.2f}"]
    cells += ["-" if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:,.0f}"]
    cells += [f"{ttft[p]:,.0f}" for p in ("p50", "p95", "p99")] + [f"{tpot[p]:,.1f}" for p in ("p50", "p95", "p99")]
    return "| " + " | ".join(map(str, cells)) + " |"


def report(rows: Sequence[Row], loads: Sequence[Load]) -> None:
    print(HEADER)
    for load in loads:
        load_rows = [entry for entry in rows if entry.load == load]
        relative = ratios(load_rows)
        for entry in load_rows:
            print(table_line(entry, relative.get(entry.engine)))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a step3-92m checkpoint (default: made in a temporary directory)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--requests", nargs="+", type=int, default=REQUESTS, help="at once")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a request")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for each engine")
    parser.add_argument("--rounds", type=int, default=1, help="every engine once in each; a row is the median of its rounds")
    parser.add_argument("--quick", action="store_true", help="a small run of what needs no installation")
    args = parser.parse_args(argv)
    if args.quick:
        args.engines, args.requests, args.contexts, args.tokens = ["afd", "colocated", "torch"], (8, 32), (128,), 64
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    loads = [Load(requests, context, args.tokens) for context in args.contexts for requests in args.requests]
    machine = hardware()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        checkpoint = args.model or preset_in(Path(made) / "step3-92m")
        for _ in range(args.rounds):
            for entry in measure(args.engines, loads, checkpoint, args.threads):
                rows.append(entry)
                print(table_line(entry, None), file=sys.stderr, flush=True)
    report(medians(rows), loads)
    print(json.dumps(result("serving", machine, args.threads, rows)))
    return 0


def result(benchmark: str, machine: str, threads: int, rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON line of a benchmark."""
    named = [entry._asdict() | {"load": entry.load._asdict()} for entry in rows]
    return {"benchmark": benchmark, "date": date.today().isoformat(), "hardware": machine, "threads": threads, "rows": named}


if __name__ == "__main__":
    sys.exit(main())
