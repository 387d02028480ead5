"""`afd-ray scale`: another number of attention and FFN ranks, while the server serves."""

import argparse
import json
from typing import Any

from actors.commands.admin import ServerError, ask
from actors.commands.arguments import add_json, add_server, integer

TIMEOUT_S = 600.0
ANSWER_MARGIN_S = 60.0
"""A resize that is out of time is rolled back, which takes a moment too."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("scale", help="resize the attention and FFN pools of a running server")
    parser.add_argument("--attention", type=integer(1, 4096), metavar="N", help="attention ranks (default: as they are)")
    parser.add_argument("--ffn", type=integer(1, 4096), metavar="M", help="FFN ranks, a multiple of the tensor parallel ones")
    parser.add_argument(
        "--ffn-tensor-parallel",
        type=integer(1, 4096),
        metavar="T",
        help="FFN ranks that share each expert (default: as they are)",
    )
    parser.add_argument(
        "--timeout", type=integer(1, 86_400), default=int(TIMEOUT_S), metavar="S", help="roll back when not over by then (600)"
    )
    add_json(parser)
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    wanted = {"attention": args.attention, "ffn": args.ffn, "ffn_tensor_parallel": args.ffn_tensor_parallel}
    body: dict[str, Any] = {name: count for name, count in wanted.items() if count is not None}
    if not body:
        raise ValueError("scale needs --attention, --ffn or --ffn-tensor-parallel")
    try:
        answer = ask(args, "/admin/scale", body | {"timeout_s": args.timeout}, args.timeout + ANSWER_MARGIN_S)
    except ServerError as refusal:
        if "outcome" not in refusal.answer:
            raise
        answer = {key: value for key, value in refusal.answer.items() if key != "error"}
    if args.as_json:
        print(json.dumps(answer, indent=2))
    if answer.get("outcome") != "committed":
        raise ServerError(f"{answer.get('outcome')}: {answer.get('reason')}")
    if not args.as_json:
        counts = answer.get("to") or {}
        pause = "" if answer.get("pause_ms") is None else f", paused {answer['pause_ms']:.0f} ms"
        print(
            f"{counts.get('attention')} attention and {counts.get('ffn')} FFN ranks, after {answer.get('total_s'):.1f} s{pause}"
        )
    return 0
