"""`afd-ray drain`: a deployed server takes no new request, and its requests in progress finish. What comes before `ray down`."""

import argparse
import os
from typing import Any

from actors.commands.arguments import host_and_port, integer
from actors.commands.joining import use_token

TIMEOUT_S = 60


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "drain", help="let a deployed server finish its requests and take no new ones; exit 1 if some had to be ended"
    )
    parser.add_argument(
        "--address", type=host_and_port, default="auto", metavar="HOST:PORT", help="its Ray cluster (default: auto)"
    )
    parser.add_argument("--application", metavar="NAME", help="its Serve application (default: the only one)")
    parser.add_argument(
        "--timeout", type=integer(0, 86_400), default=TIMEOUT_S, metavar="S", help=f"end what is not over by then ({TIMEOUT_S})"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    use_token()
    # Serve reads it at import. A cluster's logins have 0, for its proxies; a handle outside an event loop needs a loop of its own.
    os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
    from actors.draining import drain_application

    left = drain_application(args.address, args.application, args.timeout)
    if left == 0:
        print("nothing is in progress, and nothing is taken any more: not before the next serve deploy, or a new afd-ray serve")
    return 1 if left else 0
