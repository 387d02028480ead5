"""`afd-ray generate`: one prompt through a cluster of its own, without HTTP."""

import argparse
from typing import Any

from actors.commands.arguments import add_config, add_json, host_and_port, integer, unicode_text
from actors.commands.joining import use_token


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("generate", help="start a cluster, continue one prompt, stop")
    add_config(parser)
    parser.add_argument("--prompt", type=unicode_text, required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=integer(1), default=128, metavar="N", help="new tokens at most (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    parser.add_argument(
        "--address", type=host_and_port, metavar="HOST:PORT", help="join this Ray cluster instead of starting one"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from afd_ray.config import check_supported, load_config, model_directory
    from afd_ray.request import SamplingParams

    if not args.prompt:
        raise ValueError("--prompt: must not be empty")
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    config = load_config(args.config, args.overrides)
    check_supported(config)
    model_directory(config.model)
    if args.address is not None:
        use_token()
    from actors import serve

    return int(serve.generate(config, prompt=args.prompt, params=params, address=args.address, as_json=args.as_json))
