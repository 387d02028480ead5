"""How much do attention and FFN overlap? One A and one F actor on step3-92m, the engine driven directly, a core each.

Bound: with both stages equal and the transfer hidden, both actors are busy all the time and the figure is 2.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import ray

from actors.cluster import Cluster
from afd_ray.config import parse_config
from afd_ray.measured import Measured
from afd_ray.models.checkpoint import write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.request import SamplingParams
from benchmarks._machine import hardware


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a step3-92m checkpoint (default: made in a temporary directory)")
    parser.add_argument("--requests", type=int, default=36, help="decoding at once")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens a request")
    parser.add_argument("--micro-batches", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="steps to trace")
    parser.add_argument("--trace", type=Path, help="write the Chrome trace here")
    parser.add_argument("--quick", action="store_true", help="a small run")
    args = parser.parse_args(argv)
    if args.quick:
        args.requests, args.context, args.tokens, args.steps = 12, 128, 64, 12
    with tempfile.TemporaryDirectory() as made:
        model = args.model or preset_in(Path(made) / "step3-92m")
        result = measure(model, args)
    print(json.dumps(result))
    return 0


def preset_in(directory: Path) -> Path:
    config = PRESETS["step3-92m"]
    write_checkpoint(directory, config, random_tensors(config, seed=0))
    return directory


def measure(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    raw = {
        "model": {"path": str(model)},
        "attention": {"replicas": 1},
        "pipeline": {"micro_batches": args.micro_batches},
    }
    rng = random.Random(0)
    prompts = [rng.choices(range(4096), k=args.context) for _ in range(args.requests)]
    with Cluster.start(parse_config(raw), on_progress=lambda doing: print(doing, file=sys.stderr)) as cluster:
        params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
        load = threading.Thread(target=cluster.generate, args=(prompts, params))
        load.start()
        await_decode(cluster, args.requests)
        trace = cluster.trace(args.steps)
        load.join()
    if args.trace:
        args.trace.write_text(json.dumps(trace))
    return {"benchmark": "overlap", "date": date.today().isoformat(), "hardware": hardware(), **arguments(args), **figures(trace)}


def await_decode(cluster: Cluster, requests: int) -> None:
    """Until every request has its prompt behind it: as many first tokens as requests."""
    while True:
        (attention,) = ray.get([hand.status.remote() for hand in attention_handles(cluster)])
        if Measured.load(attention["measured"]).ttft_ms.count >= requests:
            return


def attention_handles(cluster: Cluster) -> list[Any]:
    return list(ray.get(cluster.controller.attention_handles.remote()))


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    names = ("requests", "context", "tokens", "micro_batches", "steps")
    return {name: getattr(args, name) for name in names}


def figures(trace: dict[str, Any]) -> dict[str, Any]:
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    mean_us = {cat: _mean(events, cat) for cat in ("attention", "ffn", "a2f", "f2a")}
    slower, faster = max(mean_us["attention"], mean_us["ffn"]), min(mean_us["attention"], mean_us["ffn"])
    return {
        "overlap": trace["otherData"]["overlap"],
        "busy": trace["otherData"]["busy"],
        "mean_us": mean_us,
        "stage_ratio": round(slower / faster, 2),
    }


def _mean(events: list[dict[str, Any]], cat: str) -> float:
    durations = [event["dur"] for event in events if event["cat"] == cat]
    return round(sum(durations) / len(durations), 1) if durations else 0.0


if __name__ == "__main__":
    sys.exit(main())
