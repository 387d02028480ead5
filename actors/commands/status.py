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
SOMETIMES = ("pace",)
"""Columns shown only where they tell something."""

ATTENTION_COLUMNS = ("id", "rank", "state", "node", "address", "pid", "running", "waiting", "kv", "pace")
FFN_COLUMNS = ("id", "rank", "state", "node", "address", "pid", "instance", "tp_rank", "experts", "pace")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("status", help="show a running server's actors, load and latency")
    add_json(parser)
    parser.add_argument("--watch", action="store_true", help="a live view, until interrupted; with --json a line a second")
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    status = ask(args, "/admin/status")
    if args.as_json:
        return _print_json(args, status)
    from rich.console import Group

    from actors.commands.console import table_console

    if not args.watch:
        table_console().print(Group(*render(status)))
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
    from rich.console import Console
    from rich.live import Live

    from actors.commands.watch import view

    console = Console()
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        for latest in _every_period(args, status):
            live.update(view(latest, ask(args, "/admin/decisions")["decisions"]), refresh=True)
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
    """The status as lines and tables; who died is told below them."""
    attention, ffn = status.get("attention") or [], status.get("ffn") or []
    parts: list[RenderableType] = [f"{status.get('model')}: {status.get('state')}, epoch {status.get('epoch')}"]
    if status.get("waiting_for"):
        parts.append(_escaped(f"waiting for {status['waiting_for']}"))
    parts.append(_table("attention", ATTENTION_COLUMNS, [_attention_row(actor) for actor in _living(attention)]))
    parts.append(_table("ffn", FFN_COLUMNS, [_ffn_row(rank) for rank in _living(ffn)]))
    parts += [_escaped(f"{actor['id']} is lost: {actor.get('reason')}") for actor in (*attention, *ffn) if _is_dead(actor)]
    parts += [_line(key, _figures(status[key])) for key in ("tpot_ms", "ttft_ms", "stages_us") if status.get(key)]
    if status.get("last_resize"):
        parts.append(_line("last resize", resize_words(status["last_resize"])))
    return parts


def _is_dead(actor: Status) -> bool:
    return actor.get("state") == "dead"


def _living(actors: list[Status]) -> list[Status]:
    return [actor for actor in actors if not _is_dead(actor)]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _line(title: str, items: list[str]) -> "RenderableType":
    """Breaks between items only."""
    from rich.columns import Columns

    return Columns([f"{title}:", *(f"{_escaped(item)}," for item in items[:-1]), *map(_escaped, items[-1:])], padding=(0, 1))


def _attention_row(actor: Status) -> Status:
    used, total = actor.get("kv_used"), actor.get("kv_total")
    return actor | {"kv": None if total is None else f"{used}/{total}"}


def _ffn_row(rank: Status) -> Status:
    return rank | {"experts": spans(rank.get("experts") or [])}


def _table(title: str, columns: tuple[str, ...], rows: list[Status]) -> "RenderableType":
    from rich.table import Table

    # What says nothing takes no room: a terminal has 80 columns.
    columns = tuple(c for c in columns if c not in SOMETIMES or any(row.get(c) is not None for row in rows))
    table = Table(title=f"{title} ({len(rows)})", title_justify="left", padding=(0, 1, 0, 0), box=None)
    for column in columns:
        table.add_column(column, no_wrap=column in ("id", "state"), overflow="fold")
    for row in rows:
        table.add_row(*(_escaped(_cell(column, row.get(column))) for column in columns))
    return table


def _cell(column: str, value: object) -> str:
    if value is None:
        return "-"
    return str(value)[:8] if column == "node" else str(value)


def _figures(values: Status) -> list[str]:
    known = {key: value for key, value in values.items() if value is not None}
    return [f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in known.items()] or ["-"]


def resize_words(resize: Status) -> list[str]:
    """As `4 attention and 1 ffn to 2 attention and 1 ffn, committed, ...`."""
    shapes = [" and ".join(f"{count} {role}" for role, count in (resize.get(end) or {}).items()) for end in ("from", "to")]
    rest = {key: value for key, value in resize.items() if key not in ("from", "to", "outcome", "reason")}
    said = [str(resize[key]) for key in ("outcome", "reason") if resize.get(key)]
    return [" to ".join(filter(None, shapes)), *said, *(_figures(rest) if any(rest.values()) else ())]


def spans(ids: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for expert in sorted(ids):
        if parts and expert == parts[-1][-1] + 1:
            parts[-1].append(expert)
        else:
            parts.append([expert])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
