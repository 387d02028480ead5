"""`afd-ray serve`: starts a cluster and serves until it is told to stop."""

import argparse
from typing import Any

from actors.commands.arguments import add_config, host_and_port, integer
from actors.commands.joining import use_token


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("serve", help="start a cluster and serve a model over HTTP")
    add_config(parser)
    parser.add_argument("--host", help="address to listen on (server.host)")
    parser.add_argument("--port", type=integer(0, 65535), help="port to listen on, 0 for any (server.port)")
    parser.add_argument(
        "--address", type=host_and_port, metavar="HOST:PORT", help="join this Ray cluster instead of starting one"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from afd_ray.config import check_supported, load_config, model_directory

    config = load_config(args.config, overrides(args))
    check_supported(config)
    model_directory(config.model)
    if args.address is not None:
        use_token()
    from actors import serve

    return int(serve.serve(config, address=args.address))


def overrides(args: argparse.Namespace) -> list[str]:
    """`--host` and `--port` are overrides that win over `--set`."""
    own = [f"server.{key}={value}" for key, value in (("host", args.host), ("port", args.port)) if value is not None]
    return [*args.overrides, *own]
