"""What does it cost to be ready for a death, while nobody dies? Throughput with journal and heartbeats and without, in pairs.

Asked: less than 2% of the throughput. Without means a controller that is stopped (SIGSTOP: nobody watches, nothing asks) and a journal that
keeps nothing, which only this benchmark has; the actors are the same ones in both halves of a pair. Beside the pairs, which are noisy on shared
cores, the same from below: what a beat and a journal entry take on one core.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

from actors.cluster import Cluster
from actors.cluster_view import ClusterView
from actors.pulse import Pulse, PulseServer
from afd_ray.config import parse_config
from afd_ray.membership.attempts import Journal
from afd_ray.request import SamplingParams
from benchmarks._machine import hardware
from benchmarks.chaos.processes import cpu_seconds, raylets, workers
from benchmarks.overlap import preset_in

VOCABULARY = 4096
ALLOWED = 0.02
WARM_UP = 3


class Unkept(Journal):
    """Takes every token, and keeps none: nothing could be replayed."""

    def accept(self, attempt: int, position: int, token: int) -> bool:
        return True


class Figures(NamedTuple):
    """One half of a pair."""

    tokens_per_s: float
    cpu_ms_per_token: float
    """Of all its processes and the client's, one after the other."""


class Pair(NamedTuple):
    ready: Figures
    """With journal and heartbeats."""
    unready: Figures

    @property
    def cost(self) -> float:
        """Share of the throughput."""
        return 1.0 - self.ready.tokens_per_s / self.unready.tokens_per_s

    @property
    def cpu_cost(self) -> float:
        """Share of the CPU time for a token."""
        return 1.0 - self.unready.cpu_ms_per_token / self.ready.cpu_ms_per_token


async def latest(view: ClusterView) -> dict[str, Any]:
    """In place of `ClusterView.refresh`: a stopped controller is not asked, and not waited for."""
    assert view.latest is not None
    return view.latest


@contextmanager
def unwatched() -> Iterator[None]:
    """Without controller and journal."""
    (controller,) = workers()["controller"]
    os.kill(controller.pid, signal.SIGSTOP)
    try:
        with patch("actors.course.Journal", Unkept):
            yield
    finally:
        os.kill(controller.pid, signal.SIGCONT)


def measure(started: Cluster, prompts: Sequence[Sequence[int]], tokens: int) -> Figures:
    """All prompts once, at once."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    cpu_s, started_s = busy_s(), time.perf_counter()
    started.generate(prompts, params)
    count = len(prompts) * tokens
    seconds = time.perf_counter() - started_s
    return Figures(count / seconds, 1000 * (busy_s() - cpu_s) / count)


def busy_s() -> float:
    return time.process_time() + sum(cpu_seconds(raylets()).values())


def pairs(model: Path, args: argparse.Namespace) -> Iterator[Pair]:
    """Which of the two comes first changes."""
    raw = {
        "model": {"path": str(model)},
        "attention": {"replicas": args.attention},
        "ffn": {"expert_parallel": args.expert_parallel},
        "failure": {"detect_timeout_s": args.detect_timeout},
    }
    rng = random.Random(0)
    prompts = [rng.choices(range(VOCABULARY), k=args.context) for _ in range(args.requests)]
    with Cluster.start(parse_config(raw)) as started:
        for _ in range(WARM_UP):
            measure(started, prompts, args.tokens)
        with patch.object(ClusterView, "refresh", latest):
            for ready_first, _ in zip(itertools.cycle((True, False)), range(args.pairs), strict=False):
                figures = {}
                for ready in (ready_first, not ready_first):
                    with nullcontext() if ready else unwatched():
                        figures[ready] = measure(started, prompts, args.tokens)
                yield Pair(figures[True], figures[False])


def journal_us() -> float:
    """Time to take in one token."""
    count, journal = 100_000, Journal()
    attempt, started_s = journal.begin(), time.process_time()
    for position in range(count):
        journal.accept(attempt, position, 7)
    return 1e6 * (time.process_time() - started_s) / count


async def beat_us() -> float:
    """CPU time of one beat there and back, both ends together."""
    count, secret = 5_000, b"s" * 32
    server = PulseServer(secret, lambda: None)
    pulse = await Pulse.open("127.0.0.1", await server.start("127.0.0.1"), secret)
    started_s = time.process_time()
    for _ in range(count):
        await pulse.beat()
    spent_s = time.process_time() - started_s
    pulse.close()
    server.close()
    return 1e6 * spent_s / count


HEADER = """\
| tokens/s with | without | cost | CPU ms a token with | without | cost |
|---|---|---|---|---|---|"""


def table_line(pair: Pair) -> str:
    ready, unready = pair
    return (
        f"| {ready.tokens_per_s:,.0f} | {unready.tokens_per_s:,.0f} | {100 * pair.cost:+.1f}% "
        f"| {ready.cpu_ms_per_token:.3f} | {unready.cpu_ms_per_token:.3f} | {100 * pair.cpu_cost:+.1f}% |"
    )


def from_below(journal_us: float, beat_us: float, tokens_per_s: float, members: int, detect_timeout_s: float) -> float:
    """Share of one core that entries and beats take at this throughput."""
    return 1e-6 * (journal_us * tokens_per_s + beat_us * members * 3 / detect_timeout_s)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a step3-92m checkpoint (default: made in a temporary directory)")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32, help="at once")
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a request")
    parser.add_argument("--attention", type=int, default=1)
    parser.add_argument("--expert-parallel", type=int, default=1)
    parser.add_argument("--detect-timeout", type=float, default=1.0, help="failure.detect_timeout_s")
    parser.add_argument("--quick", action="store_true", help="one small pair, which cannot tell anything")
    args = parser.parse_args(argv)
    if args.quick:
        args.pairs, args.tokens = 1, 32
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args, machine = arguments(argv), hardware()
    with tempfile.TemporaryDirectory() as made:
        measured = list(pairs(args.model or preset_in(Path(made) / "step3-92m"), args))
    print("\n".join([HEADER, *map(table_line, measured)]))
    print(json.dumps(result(machine, args, measured)))
    return 0


def result(machine: str, args: argparse.Namespace, measured: Sequence[Pair]) -> dict[str, Any]:
    names = ("requests", "context", "tokens", "attention", "expert_parallel", "detect_timeout")
    journal, beat = journal_us(), asyncio.run(beat_us())
    tokens_per_s = median(pair.ready.tokens_per_s for pair in measured)
    return {
        "benchmark": "upkeep",
        "date": date.today().isoformat(),
        "hardware": machine,
        **{name: getattr(args, name) for name in names},
        "cost": round(median(pair.cost for pair in measured), 4),
        "cpu_cost": round(median(pair.cpu_cost for pair in measured), 4),
        "allowed": ALLOWED,
        "journal_us": round(journal, 3),
        "beat_us": round(beat, 1),
        "from_below": round(
            from_below(journal, beat, tokens_per_s, args.attention + args.expert_parallel, args.detect_timeout), 5
        ),
        "pairs": [pair._asdict() for pair in measured],
    }


if __name__ == "__main__":
    sys.exit(main())
