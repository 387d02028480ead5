"""Policies beside each other: as JSON, as a table, and as one HTML page that needs nothing else."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from afd_ray.simulation.serving.outcome import Outcome

SHOWN_CHANGES = 200
"""Of each policy, on the page."""
COLUMNS: tuple[tuple[str, str], ...] = (
    ("policy", "policy"),
    ("GPU-hours", "gpu_hours"),
    ("SLO attainment", "slo_attainment"),
    ("TPOT p50 ms", "tpot_ms.p50"),
    ("TPOT p95 ms", "tpot_ms.p95"),
    ("TPOT p99 ms", "tpot_ms.p99"),
    ("TTFT p50 ms", "ttft_ms.p50"),
    ("TTFT p95 ms", "ttft_ms.p95"),
    ("TTFT p99 ms", "ttft_ms.p99"),
    ("resizes", "resizes"),
    ("reversals", "reversals"),
    ("refused", "refused"),
)
STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:80em}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}\
td:first-child,th:first-child{text-align:left}img{max-width:100%}td.reason{text-align:left}"
)


def as_json(outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a comparison; `about` says what was simulated."""
    return {
        **about,
        "policies": [
            outcome.summary()
            | {
                "changes": [
                    change._asdict() | {"before": str(change.before), "after": str(change.after)} for change in outcome.changes
                ],
                "course": [point._asdict() for point in outcome.points],
            }
            for outcome in outcomes
        ],
    }


def rows_of(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The table's cells, a row for each policy."""
    summaries = [outcome.summary() for outcome in outcomes]
    return [[_cell(summary, path) for _, path in COLUMNS] for summary in summaries]


def as_html(outcomes: Sequence[Outcome], about: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """`pictures`: titles and PNG files, which the page carries in itself."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>afd-ray simulate</title>", f"<style>{STYLE}</style>"]
    parts.append("<h1>Policies compared</h1>")
    parts.append("<p>" + "<br>".join(f"{_text(key)}: {_text(value)}" for key, value in about.items()) + "</p>")
    parts.append(_table([name for name, _ in COLUMNS], rows_of(outcomes)))
    for title, picture in pictures.items():
        data = base64.b64encode(picture).decode("ascii")
        parts.append(f'<h2>{_text(title)}</h2><img alt="{_text(title)}" src="data:image/png;base64,{data}">')
    for outcome in outcomes:
        shown = outcome.changes[:SHOWN_CHANGES]
        parts.append(f"<h2>Changes by {_text(outcome.policy)}: {len(outcome.changes)}</h2>")
        cells = [[f"{c.at_s:.0f}", str(c.before), str(c.after), c.outcome, c.reason] for c in shown]
        parts.append(_table(["at s", "from", "to", "outcome", "reason"], cells))
    return "\n".join(parts) + "\n</html>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _cell(summary: Mapping[str, Any], path: str) -> str:
    value: Any = summary
    for key in path.split("."):
        value = value[key] if value is not None else None
    if isinstance(value, float):
        return f"{value:.2%}" if path == "slo_attainment" else f"{value:,.1f}"
    return "-" if value is None else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))
