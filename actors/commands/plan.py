"""`afd-ray plan`: the ratio, batch, memory and price of a deployment before it exists, and the paper's tables from the same formulas."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.commands.arguments import add_json, integer

if TYPE_CHECKING:
    from afd_ray.planning.accelerators import Accelerator
    from afd_ray.planning.search import Target

MOST_MICRO_BATCHES = 4


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("plan", help="find the cheapest deployment for a latency target, before there is any hardware")
    parser.add_argument("--model", default="step3", metavar="NAME", help="of the catalogue (default step3)")
    parser.add_argument(
        "--hardware", default="h800,h20", metavar="NAME[,NAME...]", help="either half may run on any of them (default h800,h20)"
    )
    parser.add_argument(
        "--context", type=integer(1, 2**31), default=8192, metavar="TOKENS", help="of a request, on average (8192)"
    )
    parser.add_argument("--tpot-ms", type=positive, default=50.0, metavar="MS", help="time for each token at most (50)")
    parser.add_argument(
        "--micro-batches", type=integer(1, MOST_MICRO_BATCHES), metavar="N", help="in flight (default: what is cheapest)"
    )
    parser.add_argument("--kv-dtype", choices=("fp8", "bf16"), help="of keys and values (default: the catalogue's)")
    parser.add_argument("--max-gpus", type=integer(16, 4096), default=128, metavar="N", help="both halves together (128)")
    parser.add_argument(
        "--price",
        dest="prices",
        type=price,
        action="append",
        default=[],
        metavar="NAME=USD",
        help="an hour of one; may be repeated",
    )
    parser.add_argument("--checkpoint", default="CHECKPOINT_DIRECTORY", metavar="DIR", help="goes into the configuration")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the configuration there instead of printing it")
    parser.add_argument(
        "--reproduce", action="store_true", help="compute the paper's tables; exit 1 if one figure is out of tolerance"
    )
    parser.add_argument(
        "--measured",
        metavar="FILE_OR_DIR",
        help="the paper's deployments with stage times that benchmarks/gpu_*.py measured (JSON), beside the paper's figures",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def price(text: str) -> tuple[str, float]:
    """An argparse type: NAME=USD."""
    name, equals, usd = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=USD, got {text!r}")
    return name, positive(usd)


def run(args: argparse.Namespace) -> int:
    if args.reproduce and args.measured is not None:
        raise ValueError("--measured and --reproduce are two questions, ask one")
    if args.reproduce:
        return run_reproduce(args.as_json)
    if args.measured is not None:
        return run_measured(Path(args.measured), args.as_json)
    from afd_ray.config import parse_config
    from afd_ray.planning import catalogue
    from afd_ray.planning.configuration import configuration, configuration_text
    from afd_ray.planning.costs import least_usd
    from afd_ray.planning.report import describe
    from afd_ray.planning.search import plans

    target = target_of(args)
    found = plans(target, catalogue.hardware().achieved)
    parse_config(configuration(found[0], args.checkpoint, args.tpot_ms), "plan")
    text = configuration_text(found[0], args.checkpoint, args.tpot_ms)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
    best, *others = map(describe, found)
    peaks = {"usd_per_million_tokens": round(1e6 * least_usd(target.shape, list(target.gpus.values()), target.context), 4)}
    if args.as_json:
        print(json.dumps({"plan": best, "alternatives": others, "at_peaks": peaks, "configuration": text}, indent=2))
        return 0
    from actors.commands.plan_tables import print_plans

    print_plans(target.shape.name, [best, *others], peaks)
    print(f"configuration: {args.output}" if args.output else f"\n{text}".rstrip())
    return 0


def run_reproduce(as_json: bool) -> int:
    """0 when every figure is within its tolerance."""
    from afd_ray.planning.reproduce import comparisons

    found = list(comparisons())
    if as_json:
        print(json.dumps([c._asdict() | {"deviation": c.deviation, "holds": c.holds} for c in found], indent=2))
    else:
        from actors.commands.plan_tables import print_comparisons

        print_comparisons(found)
    return 0 if all(c.holds for c in found) else 1


def run_measured(path: Path, as_json: bool) -> int:
    """Raises ValueError in one line where the times cannot be read."""
    from afd_ray.planning.measured import read_measured
    from afd_ray.planning.projection import ALWAYS_ASSUMED, describe, projections

    measured = read_measured(path)
    found = [describe(projection) for projection in projections(measured)]
    if as_json:
        told = {"measured": measured.model_dump(mode="json"), "assumed": ALWAYS_ASSUMED, "deployments": found}
        print(json.dumps(told, indent=2))
        return 0
    from actors.commands.plan_tables import print_projections

    print_projections(f"{measured.device}: {measured.source}", found, ALWAYS_ASSUMED)
    return 0


def target_of(args: argparse.Namespace) -> "Target":
    """What the arguments ask for; raises ValueError for names that the catalogue lacks."""
    from afd_ray.planning import catalogue
    from afd_ray.planning.search import Target

    shape = catalogue.model(args.model)
    if args.kv_dtype:
        shape = shape.with_cache_bytes(1 if args.kv_dtype == "fp8" else 2)
    names = [name.strip() for name in args.hardware.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--hardware: must name at least one accelerator, got {args.hardware!r}")
    counts = (args.micro_batches,) if args.micro_batches else range(1, MOST_MICRO_BATCHES + 1)
    return Target(shape, _priced(names, args.prices), args.context, args.tpot_ms, counts, args.max_gpus)


def _priced(names: Sequence[str], prices: Sequence[tuple[str, float]]) -> "dict[str, Accelerator]":
    from afd_ray.planning import catalogue

    spelled = catalogue.hardware().accelerators
    gpus = {name: catalogue.accelerator(name) for name in (catalogue.known("hardware", name, spelled) for name in names)}
    for name, usd_per_hour in prices:
        name = catalogue.known("price", name, gpus)
        gpus[name] = gpus[name].at_price(usd_per_hour)
    return gpus
