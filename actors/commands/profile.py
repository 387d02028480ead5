"""`afd-ray profile`: what the stages of a live cluster last, as a file for the simulator."""

import argparse
import json
import os
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.commands.arguments import add_config, add_json, url
from actors.commands.progress import ProgressLine

if TYPE_CHECKING:
    from actors.profiling import Subject


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("profile", help="measure how long a cluster's stages last, for `simulation.profile`")
    add_config(parser)
    parser.add_argument("--url", type=url, help="a running server, instead of a cluster of its own that is started and stopped")
    parser.add_argument("--api-key", metavar="KEY", help="of the running server, with admin rights (default: $AFD_ADMIN_KEY)")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="JSON to write")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"-o: {output.parent} is no directory")
    if output.is_dir():
        raise ValueError(f"-o: {output} is a directory, give a file")
    if args.url is not None and (args.config is not None or args.overrides):
        raise ValueError(f"--url: {args.url} serves with a configuration of its own, leave CONFIG and --set out")
    found = _of_server(args) if args.url is not None else _of_own_cluster(args)
    text = json.dumps(found, indent=1)
    output.write_text(text + "\n", encoding="utf-8")
    if args.as_json:
        print(text)
    else:
        _show(found)
        print(f"{output}: simulate with --set simulation.profile={output}", file=sys.stderr)
    return 0


def _of_server(args: argparse.Namespace) -> dict[str, Any]:
    from actors.profiling import Served

    return _measure(Served(args.url, args.api_key or os.environ.get("AFD_ADMIN_KEY")), args.url)


def _of_own_cluster(args: argparse.Namespace) -> dict[str, Any]:
    from actors.cluster import Cluster
    from actors.profiling import Started
    from afd_ray.config import load_config

    config = load_config(args.config, args.overrides)
    with Cluster.start(config) as cluster:
        return _measure(Started(cluster), config.model.served_name)


def _measure(subject: "Subject", what: str) -> dict[str, Any]:
    from actors.profiling import profile

    line = ProgressLine(f"profiling {what}")
    try:
        return profile(subject, {"of": what, "date": date.today().isoformat()}, line)
    finally:
        line.finish()


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = {"attention": "attention, one rank", "ffn": "FFN, the rows of all ranks", "transfer": "transfer, both ways"}
    for stage, title in titles.items():
        points = found[stage]
        table = Table(title=title, title_justify="left")
        columns = dict.fromkeys(name for point in points for name, value in point.items() if isinstance(value, int | float))
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right")
        for point in points:
            table.add_row(*(f"{point[column]:,.6g}" if column in point else "" for column in columns))
        Console().print(table)
