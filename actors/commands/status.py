"""`afd-ray status`: what a running server is doing."""

import argparse
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actors.commands.admin import ask
from actors.commands.arguments import add_json, add_server

if TYPE_CHECKING:
    from rich.console import RenderableType

PERIOD_S = 1.0
Status = dict[str, Any]

ATTENTION_COLUMNS = ("id", "rank", "state", "node", "address", "pid", "running", "waiting", "kv", "pace")
FFN_COLUMNS = ("id", "rank", "state", "node", "address", "pid", "instance", "tp_rank", "experts", "pace")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("status", help="show a running server's actors, load and latency")
    add_json(parser)
    parser.add_argument("--watch", action="store_true", help="once a second, until interrupted")
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    status = ask(args, "/admin/status")
    if args.as_json:
        return _print_json(args, status)
    from rich.console import Console, Group

    if not args.watch:
        Console().print(Group(*render(status)))
        return 0
    return _watch(args, status)


def _print_json(args: argparse.Namespace, status: Status) -> int:
    if not args.watch:
        print(json.dumps(status, indent=2))
        return 0
    for latest in _every_period(args, status):
        print(json.dumps(latest), flush=True)
    return 0


def _watch(args: argparse.Namespace, status: Status) -> int:
    from rich.console import Group
    from rich.live import Live

    with Live(Group(*render(status)), auto_refresh=False) as live:
        for latest in _every_period(args, status):
            live.update(Group(*render(latest)), refresh=True)
    return 0


def _every_period(args: argparse.Namespace, status: Status) -> Iterator[Status]:
    try:
        while True:
            yield status
            time.sleep(PERIOD_S)
            status = ask(args, "/admin/status")
    except KeyboardInterrupt:
        return


def render(status: Status) -> "list[RenderableType]":
    """The status as lines and tables."""
    parts: list[RenderableType] = [f"{status.get('model')}: {status.get('state')}, epoch {status.get('epoch')}"]
    parts.append(_table("attention", ATTENTION_COLUMNS, [_attention_row(actor) for actor in status.get("attention") or []]))
    parts.append(_table("ffn", FFN_COLUMNS, [_ffn_row(rank) for rank in status.get("ffn") or []]))
    parts += [f"{key}: {_figures(status[key])}" for key in ("tpot_ms", "ttft_ms", "stages_us") if status.get(key)]
    if status.get("last_resize"):
        parts.append(f"last resize: {_figures(status['last_resize'])}")
    return parts


def _attention_row(actor: Status) -> Status:
    return actor | {"kv": f"{actor.get('kv_used')}/{actor.get('kv_total')}"}


def _ffn_row(rank: Status) -> Status:
    return rank | {"experts": spans(rank.get("experts") or [])}


def _table(title: str, columns: tuple[str, ...], rows: list[Status]) -> "RenderableType":
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=f"{title} ({len(rows)})", title_justify="left")
    for row in rows:
        table.add_row(*(escape(_cell(column, row.get(column))) for column in columns))
    return table


def _cell(column: str, value: object) -> str:
    if value is None:
        return "-"
    return str(value)[:8] if column == "node" else str(value)


def _figures(values: Status) -> str:
    return ", ".join(f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())


def spans(ids: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for expert in sorted(ids):
        if parts and expert == parts[-1][-1] + 1:
            parts[-1].append(expert)
        else:
            parts.append([expert])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
