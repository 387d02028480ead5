"""`afd-ray decisions`: what the autoscaler decided, why, and what became of it."""

import argparse
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actors.commands.admin import ask
from actors.commands.arguments import add_json, add_server

if TYPE_CHECKING:
    from rich.text import Text

PERIOD_S = 1.0
Decision = dict[str, Any]
STYLES = {"resize": "bold", "by_hand": "bold", "committed": "green", "rolled_back": "red", "refused": "red", "give_up": "red"}
"""Of an action; nothing was done where there is none."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("decisions", help="show what the autoscaler of a running server decided, and why")
    parser.add_argument("--follow", action="store_true", help="go on with those to come, until interrupted")
    add_json(parser)
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    answer = ask(args, "/admin/decisions")
    if args.follow:
        return _follow(args, answer)
    if args.as_json:
        print(json.dumps(answer, indent=2))
        return 0
    if not answer["decisions"]:
        print(f"no decisions yet; the policy is {answer['policy']}")
    _show(answer["decisions"])
    return 0


def _follow(args: argparse.Namespace, answer: dict[str, Any]) -> int:
    for decisions in _every_period(args, answer):
        if args.as_json:
            for decision in decisions:
                print(json.dumps(decision), flush=True)
        else:
            _show(decisions)
    return 0


def _every_period(args: argparse.Namespace, answer: dict[str, Any]) -> Iterator[list[Decision]]:
    """Those there are, and then those that came since."""
    seen = 0
    try:
        while True:
            decisions = answer["decisions"]
            yield decisions
            seen = max((decision["number"] for decision in decisions), default=seen)
            time.sleep(PERIOD_S)
            answer = ask(args, f"/admin/decisions?after={seen}")
    except KeyboardInterrupt:
        return


def _show(decisions: list[Decision]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True)
    for decision in decisions:
        console.print(line(decision))


def line(decision: Decision) -> "Text":
    """When, from what to what, what was done, and why."""
    from rich.text import Text

    at = time.strftime("%H:%M:%S", time.localtime(decision["at_s"]))
    before, wanted = (_counts(decision[key]) for key in ("before", "wanted"))
    counts = before if before == wanted else f"{before} to {wanted}"
    action, style = decision["action"], STYLES.get(decision["action"], "dim")
    load = decision["seen"]
    figures = f" [{load['requests']} requests, TPOT p95 {_ms(load['tpot_p95_ms'])}]" if load else ""
    return Text(f"{at}  {counts:<12}  {action.replace('_', ' '):<11}  {decision['reason']}{figures}", style)


def _counts(counts: dict[str, int]) -> str:
    return f"{counts['attention']}A{counts['ffn']}F"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
