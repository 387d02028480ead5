"""The tables of `afd-ray plan`: plans, and the paper's figures beside ours."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from actors.commands.console import table_console
from afd_ray.planning.reproduce import Comparison


def print_plans(model: str, found: Sequence[dict[str, Any]], peaks: dict[str, float]) -> None:
    """The first of `found`, as `report.describe` tells it, and a line for each of them if there are more."""
    console = table_console()
    facts = Table(title=f"{model}: the cheapest plan", title_justify="left", show_header=False)
    for name, value in _facts(found[0], peaks):
        facts.add_row(name, value)
    console.print(facts)
    if len(found) > 1:
        columns = (
            "attention",
            "FFN",
            "A:F servers",
            "micro-batches",
            "batch",
            "TPOT ms",
            "tokens/s/GPU",
            "USD/M tokens",
            "binding",
        )
        others = Table(*columns, title="Best for each pair of accelerators", title_justify="left")
        for row in found:
            others.add_row(*_alternative(row))
        console.print(others)


def _facts(row: dict[str, Any], peaks: dict[str, float]) -> list[tuple[str, str]]:
    halves = [
        f"{row[half]['ranks']} ranks on {row[half]['servers']} server(s) of 8 {row[half]['hardware']}"
        for half in ("attention", "ffn")
    ]
    a, f, us = row["memory_gb"]["attention_rank"], row["memory_gb"]["ffn_rank"], row["stages_us"]
    return [
        (
            "A:F",
            f"{row['attention']['ranks']}:{row['ffn']['ranks']} ranks, {row['instances']} in servers of 8, {row['gpus']} GPUs",
        ),
        ("attention", f"{halves[0]}, {a['held']} of {a['of']} GB each ({a['weights']} weights, {a['kv_cache']} KV)"),
        ("FFN", f"{halves[1]}, {f['held']} of {f['of']} GB each"),
        (
            "micro-batches",
            f"{row['micro_batches']} of {row['micro_batch']:,} rows ({row['rows_per_attention_rank']} on each attention rank)",
        ),
        ("requests at once", f"{row['batch']:,}"),
        ("TPOT", f"{row['tpot_ms']} ms"),
        ("throughput", f"{row['tokens_per_s']:,} tokens/s, {row['tokens_per_gpu_s']:,} for each GPU"),
        ("price", f"{row['usd_per_million_tokens']} USD for a million tokens, {row['usd_per_hour']} an hour"),
        ("at the peaks of the hardware", f"{peaks['usd_per_million_tokens']} USD for a million tokens"),
        ("binding constraint", row["binding"]),
        ("a layer's stages", f"attention {us['attention']}, to FFN {us['a2f']}, FFN {us['ffn']}, back {us['f2a']} us"),
        ("slower half waits", f"{row['bubble']:.1%} (never from {row['micro_batches_without_bubble']} micro-batches on)"),
    ]


def _alternative(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["attention"]["hardware"],
        row["ffn"]["hardware"],
        f"{row['attention']['servers']}:{row['ffn']['servers']}",
        str(row["micro_batches"]),
        f"{row['batch']:,}",
        f"{row['tpot_ms']:.1f}",
        f"{row['tokens_per_gpu_s']:,.0f}",
        f"{row['usd_per_million_tokens']:.3f}",
        row["binding"],
    )


def print_projections(measured: str, found: Sequence[dict[str, Any]], assumed: Iterable[str]) -> None:
    """Each of `found`, as `projection.describe` tells it: what it reaches, then what of its stages was measured and what was not."""
    console = table_console()
    columns = ("", "GPUs", "batch", "TPOT ms", "tokens/s/GPU", "the paper's", "deviation", "binding")
    reached = Table(*columns, title=f"Projected from {measured}", title_justify="left")
    for row in found:
        figures = f"{row['batch']:,}", f"{row['tpot_ms']:.1f}", f"{row['tokens_per_gpu_s']:,.0f}"
        paper = f"{row['paper_tokens_per_gpu_s']:,}", f"{row['deviation']:+.1%}"
        reached.add_row(row["name"], str(row["gpus"]), *figures, *paper, row["binding"])
    console.print(reached)
    for title, bases in (("Measured, us a layer", ("measured", "extended")), ("Assumed, us a layer", ("assumed",))):
        parts = Table("", *(row["name"] for row in found), title=title, title_justify="left")
        for what in _in_order(part["what"] for row in found for part in row["parts"] if part["basis"] in bases):
            parts.add_row(what, *(_part(row["parts"], what, bases) for row in found))
        if parts.rows:
            console.print(parts)
    console.print("extended: beyond the points that were measured, or from a cache of another precision")
    for line in assumed:
        console.print(f"assumed: {line}")


def _part(parts: Sequence[dict[str, Any]], what: str, bases: Sequence[str]) -> str:
    part = next((part for part in parts if part["what"] == what and part["basis"] in bases), None)
    if part is None:
        return ""
    return f"{part['us']:.0f}" + (" extended" if part["basis"] == "extended" else "")


def print_comparisons(found: Sequence[Comparison]) -> None:
    """A table for each of the paper's, then how many figures are within tolerance and which are not."""
    console = table_console()
    for title, group in groupby(found, key=lambda c: c.table):
        console.print(_table(title, list(group)))
    outside = [c for c in found if not c.holds]
    console.print(f"{len(found) - len(outside)} of {len(found)} figures within tolerance")
    for c in outside:
        console.print(f"outside: {c.table}, {c.row}, {c.column}: {_figure(c.computed)}, printed {_figure(c.printed)}")


def _table(title: str, group: Sequence[Comparison]) -> Table:
    columns = _in_order(c.column for c in group)
    table = Table("", *columns, title=f"{title} (computed, printed, deviation)", title_justify="left")
    for row in _in_order(c.row for c in group):
        cells = {c.column: _cell(c) for c in group if c.row == row}
        table.add_row(row, *(cells.get(column, "") for column in columns))
    return table


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _cell(c: Comparison) -> str:
    deviation = f"{c.deviation:+.1%}" if c.kind == "relative" else f"{c.deviation:+.{_decimals(c)}f}"
    return f"{_figure(c.computed)}  {_figure(c.printed)}  {deviation}" + ("" if c.holds else " OUTSIDE")


def _decimals(c: Comparison) -> int:
    return 4 if abs(c.printed) < 1 else 2


def _figure(value: float) -> str:
    if value >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.4f}" if value < 1 else f"{value:,.6g}"
