"""`afd-ray trace`: some steps of every actor, as a file for Perfetto or chrome://tracing."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from actors.commands.admin import ServerError, ask
from actors.commands.arguments import add_server, integer

TIMEOUT_S = 120.0


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("trace", help="record steps of every actor of a running server")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="Chrome trace JSON to write")
    parser.add_argument("--steps", type=integer(1, 10_000), default=20, metavar="N", help="steps to record (default 20)")
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"-o: {output.parent} is no directory")
    if output.is_dir():
        raise ValueError(f"-o: {output} is a directory, give a file")
    trace = ask(args, "/admin/trace", {"steps": args.steps}, TIMEOUT_S)
    events = trace.get("traceEvents")
    if not isinstance(events, list):
        raise ServerError("the server's answer holds no traceEvents")
    if not any(event.get("ph") != "M" for event in events):
        raise ServerError("no request was in progress, so there was no step to record: trace while the server has requests")
    output.write_text(json.dumps(trace), encoding="utf-8")
    print(f"{output}: {len(events)} events, open it in https://ui.perfetto.dev", file=sys.stderr)
    figures = trace.get("otherData") or {}
    if figures.get("overlap") is not None:
        busy = ", ".join(f"{name} {share:.0%}" for name, share in figures["busy"].items())
        print(f"overlap {figures['overlap']:.2f} (busy: {busy})", file=sys.stderr)
    else:
        print("overlap: not known, not every actor was at work", file=sys.stderr)
    return 0
