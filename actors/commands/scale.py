"""`afd-ray scale`: another number of attention and FFN ranks, while the server serves."""

import argparse
import json
import sys
from typing import Any

from actors.commands.admin import ServerError, ask
from actors.commands.arguments import DEFAULT_URL, add_json, add_server, integer

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
    parser.add_argument("--cancel", action="store_true", help="roll back the resize that is in progress instead")
    add_json(parser)
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    wanted = {"attention": args.attention, "ffn": args.ffn, "ffn_tensor_parallel": args.ffn_tensor_parallel}
    body: dict[str, Any] = {name: count for name, count in wanted.items() if count is not None}
    if args.cancel:
        return _cancel(args, body)
    if not body:
        raise ValueError("scale needs --attention, --ffn or --ffn-tensor-parallel, or --cancel")
    try:
        answer = ask(args, "/admin/scale", body | {"timeout_s": args.timeout}, args.timeout + ANSWER_MARGIN_S)
    except KeyboardInterrupt:
        print(f"afd-ray: the resize goes on; to call it off: afd-ray scale --cancel{_where(args)}", file=sys.stderr)
        raise
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


def _cancel(args: argparse.Namespace, body: dict[str, Any]) -> int:
    if body:
        raise ValueError("--cancel stands alone: it rolls back the resize that is in progress")
    answer = ask(args, "/admin/scale", {"cancel": True}, ANSWER_MARGIN_S)
    print(json.dumps(answer, indent=2) if args.as_json else f"{answer.get('outcome')}: {answer.get('reason')}")
    return 0


def _where(args: argparse.Namespace) -> str:
    """The server, as it was given."""
    if args.address is not None:
        return f" --address {args.address}"
    return f" --url {args.url}" if args.url != DEFAULT_URL else ""
