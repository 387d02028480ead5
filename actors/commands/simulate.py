"""`afd-ray simulate`: autoscaling policies compared on a trace, on a virtual clock."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.commands.arguments import add_json, integer
from actors.commands.progress import ProgressLine

if TYPE_CHECKING:
    from afd_ray.simulation.serving import Arrival, Outcome

MIN_WIDTH = 120
"""Of the table: narrower, its figures would be cut."""
NO_PLOTS = "afd-ray: the report has no plots, they need matplotlib: pip install 'afd-ray[plots]'"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("simulate", help="compare autoscaling policies on a trace, on a virtual clock")
    parser.add_argument("--config", metavar="FILE", help="a YAML file or a bundled name, with its `simulation` section")
    parser.add_argument(
        "--trace",
        required=True,
        metavar="TRACE",
        help="a file in Mooncake's, BurstGPT's or Azure's format, or KIND[:key=value,...] (poisson, bursty, diurnal, drift, day)",
    )
    parser.add_argument(
        "--policy", nargs="+", metavar="POLICY", help="built-in names or module:function (default: the configuration's)"
    )
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="another seed, another trace and other failures")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.json, report.html and the plots there")
    parser.add_argument("--step-by-step", action="store_true", help="every sequence through the live scheduler: slow")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from afd_ray.autoscaling import load_policy
    from afd_ray.config import load_config
    from afd_ray.simulation.serving import Scene, simulate
    from afd_ray.simulation.serving.report import as_json

    config = load_config(args.config, args.overrides)
    scene = Scene.of(config, args.step_by_step)
    names = args.policy or [config.autoscaling.policy]
    policies = [load_policy(name) for name in names]
    arrivals, length_s = _trace(args.trace, args.seed)
    outcomes = []
    for name, policy in zip(names, policies, strict=True):
        line = ProgressLine(f"simulating {name}")
        shown = partial(_show_progress, line, length_s)
        outcomes.append(simulate(scene, arrivals(), policy, name=name, seed=args.seed, progress=shown))
        line.finish()
    about = {"trace": args.trace, "seed": args.seed, "config": args.config or "demo"}
    if args.out is not None:
        targets = config.autoscaling.tpot_target_ms, config.autoscaling.ttft_target_ms
        _write(args.out, outcomes, about | {"TPOT target ms": targets[0], "TTFT target ms": targets[1]}, targets)
    if args.as_json:
        print(json.dumps(as_json(outcomes, about), indent=2))
    else:
        _show(outcomes)
    return _report_failures(outcomes)


def _report_failures(outcomes: "list[Outcome]") -> int:
    """A line for each policy that gave no sound answer; 1 where one never gave any, for its figures are then not its own."""
    for outcome in outcomes:
        if outcome.failures.failed:
            print(f"afd-ray: {outcome.policy} {outcome.failures}", file=sys.stderr)
    return int(any(outcome.failures.always for outcome in outcomes))


def _show_progress(line: ProgressLine, length_s: float, now_s: float) -> None:
    line(int(min(now_s, length_s)), int(length_s))


def _trace(text: str, seed: int) -> tuple[Callable[[], "Iterator[Arrival]"], float]:
    """The arrivals, as often as they are asked for, and how long they go on."""
    from afd_ray.simulation.serving import KINDS, draw, parse_synthetic, read_trace

    path = Path(text)
    drawn = text.partition(":")[0] in KINDS  # 0.5 in it is no suffix
    if text and (path.exists() or (path.suffix and not drawn)):
        last_s = None
        for arrival in read_trace(path):
            last_s = arrival.at_s
        if last_s is None:
            raise ValueError(f"{text}: no request in it has a prompt and an answer")
        return lambda: read_trace(path), last_s
    synthetic = parse_synthetic(text)
    return lambda: draw(synthetic, seed), synthetic.duration_s


def _write(directory: Path, outcomes: "list[Outcome]", about: dict[str, Any], targets: tuple[float, float]) -> None:
    from afd_ray.simulation.serving.report import as_html, as_json

    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, bytes] = {}
    try:
        from afd_ray.simulation.serving import plots
    except ImportError:
        print(NO_PLOTS, file=sys.stderr)
    else:
        pictures = dict(plots.pictures(outcomes, *targets))
    for title, picture in pictures.items():
        (directory / f"{_file_name(title)}.png").write_bytes(picture)
    (directory / "report.json").write_text(json.dumps(as_json(outcomes, about), indent=1) + "\n")
    (directory / "report.html").write_text(as_html(outcomes, about, pictures))


def _file_name(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _show(outcomes: "list[Outcome]") -> None:
    from rich.console import Console
    from rich.table import Table

    from afd_ray.simulation.serving.report import COLUMNS, rows_of

    table = Table()
    for name, _ in COLUMNS:
        table.add_column(name, no_wrap=name == "policy", justify="left" if name == "policy" else "right")
    for row in rows_of(outcomes):
        table.add_row(*row)
    Console(width=max(MIN_WIDTH, Console().width)).print(table)
