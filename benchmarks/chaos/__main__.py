"""Does any client notice when something dies? `afd-ray serve` on step3-tiny in float32, kill -9 and SIGSTOP by a seeded schedule, clients that stream.

Asked: of deaths of attention and FFN actors and of the controller no client hears, every stream is the undisturbed one token for token; of a
death of Serve's own actors every client gets a retryable error or goes on; the slowest answer stands still 0.5 s (p50 over deaths) where an FFN
actor dies of whose experts there are copies, 1.5 s for an attention actor; afterwards the cluster holds what it held before.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_args

from actors.commands.joining import use_own_token

use_own_token()

from actors.serve import joined  # noqa: E402
from afd_ray.models.checkpoint import write_checkpoint  # noqa: E402
from afd_ray.models.presets import PRESETS, random_tensors  # noqa: E402
from benchmarks._machine import hardware  # noqa: E402
from benchmarks._server import served  # noqa: E402
from benchmarks.chaos.run import Plan, Result, run  # noqa: E402
from benchmarks.chaos.schedule import CALM_SHARE, Shape, Victim, faults  # noqa: E402
from benchmarks.chaos.tables import figures, markdown  # noqa: E402

SHAPE = Shape(2, 2, 1)
MODEL = "step3-tiny"


def settings(model: Path, args: argparse.Namespace) -> list[str]:
    """Arguments of `afd-ray serve`: every expert twice, so that any FFN actor can be done without."""
    chosen = {
        "model.path": model,
        "model.name": MODEL,
        "attention.replicas": SHAPE.attention,
        "ffn.expert_parallel": SHAPE.ffn,
        "ffn.redundant_experts": PRESETS[MODEL].moe_num_experts,
        "failure.detect_timeout_s": args.detect_timeout,
    }
    return [text for key, value in chosen.items() for text in ("--set", f"{key}={value}")]


def measure(model: Path, args: argparse.Namespace) -> Result:
    schedule = list(faults(args.seed, args.kills, args.pauses, args.victims, args.calm_share))
    plan = Plan(MODEL, PRESETS[MODEL].vocab_size, SHAPE, schedule, args.seed, args.clients, args.tokens, args.patience)
    with served(*settings(model, args)) as server, joined(server.ray_address):
        return asyncio.run(run(server.url, plan))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pauses", type=int, default=0, help="processes stopped and let go on, besides")
    parser.add_argument("--victims", nargs="+", choices=get_args(Victim), default=get_args(Victim))
    parser.add_argument("--calm-share", type=float, default=CALM_SHARE, help="of the faults: while nothing else is going on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=32, help="streaming at once")
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--detect-timeout", type=float, default=1.0, help="failure.detect_timeout_s")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds for the cluster to be whole again, and for a client's next token"
    )
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="add the account to DIRECTORY/chaos.md")
    parser.add_argument("--quick", action="store_true", help="a few kills")
    args = parser.parse_args(argv)
    if args.quick:
        args.kills, args.pauses = 4, 0
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0 when no client lost anything and nothing is left behind."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    machine, started_s = hardware(), time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        model = Path(made) / MODEL
        write_checkpoint(model, PRESETS[MODEL], random_tensors(PRESETS[MODEL], seed=0))
        result = measure(model, args)
    account = markdown(result)
    print(account)
    print(json.dumps(line(machine, args, result)))
    if args.write:
        write(args.write / "chaos.md", machine, argv, account, time.monotonic() - started_s)
    return 0 if result.good else 1


def line(machine: str, args: argparse.Namespace, result: Result) -> dict[str, Any]:
    named = {name: getattr(args, name) for name in ("seed", "clients", "detect_timeout", "pauses")}
    return {"benchmark": "chaos", "date": date.today().isoformat(), "hardware": machine, **named, **figures(result)}


def write(file: Path, machine: str, argv: Sequence[str], account: str, seconds: float) -> None:
    """Add one run to the file."""
    command = f"python -m benchmarks.chaos {' '.join(argv)}"
    head = f"{date.today().isoformat()}, {machine}, {seconds / 60:.0f} minutes: `{command}`"
    before = file.read_text() if file.exists() else "# Does any client notice when something dies?\n"
    file.write_text(f"{before}\n{head}\n\n{account}\n")


if __name__ == "__main__":
    sys.exit(main())
