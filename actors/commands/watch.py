"""The live view of `afd-ray status --watch`: latency against its targets, the two pools, where a layer's time goes, what was changed and why."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from actors.commands import decisions as told
from actors.commands.status import resize_words, spans

Status = dict[str, Any]
BAR, SHORT_BAR = 16, 5
"""Characters: a terminal has 80."""
EIGHTHS = " ▏▎▍▌▋▊▉"
WARM, HOT = 0.8, 1.0
"""Shares of what is allowed."""
KV_ALLOWED = 0.95
LAST_DECISIONS = 5
STATE_STYLES = {"ready": "green", "running": "green", "resizing": "yellow", "draining": "yellow", "starting": "yellow"}
"""Others are red."""


def view(status: Status, decisions: Sequence[Status] = ()) -> RenderableType:
    """The whole view. `decisions`: the autoscaler's, oldest first."""
    attention, ffn = (_living(status.get(role) or []) for role in ("attention", "ffn"))
    tables = _latencies(status), _attention(attention), _ffn(ffn), _stages(status.get("stages_us") or {})
    parts = [part for table in tables for part in (table, "")]
    title = Text.assemble(
        f"{status.get('model')}  ", _state(status.get("state")), f"  epoch {status.get('epoch')}  {len(attention)}A{len(ffn)}F"
    )
    return Panel(Group(*parts, *_changes(status, decisions)), title=title, subtitle=_load(status, attention), padding=(1, 1))


def bar(share: float, style: str, width: int = BAR) -> Text:
    """A share from 0 to 1; what is beyond fills the bar."""
    full, eighths = divmod(round(min(max(share, 0.0), 1.0) * width * 8), 8)
    filled = "█" * full + (EIGHTHS[eighths] if eighths else "")
    return Text.assemble((filled, style), ("─" * (width - len(filled)), "dim"))


def heat(share: float) -> str:
    """The style of a share of what is allowed."""
    return "green" if share < WARM else "yellow" if share < HOT else "red"


def _living(actors: Iterable[Status]) -> list[Status]:
    return [actor for actor in actors if actor.get("state") != "dead"]


def _state(state: str | None) -> Text:
    return Text(str(state), STATE_STYLES.get(str(state), "red"))


def _load(status: Status, attention: list[Status]) -> str:
    running, waiting = (sum(actor.get(key) or 0 for actor in attention) for key in ("running", "waiting"))
    policy = (status.get("autoscaling") or {}).get("policy", "fixed")
    return f"{running} running, {waiting} waiting, {status.get('output_tokens_s') or 0:.1f} tokens/s, policy {policy}"


def _latencies(status: Status) -> Table:
    """Over the last minute; the bar is p95 against the target."""
    table, targets = _grid("last minute", "p50", "p95", "p99", "p95 of target"), status.get("targets_ms") or {}
    for name, key in (("TPOT", "tpot"), ("TTFT", "ttft"), ("queue wait", "queue_wait")):
        found, target = status.get(f"{key}_ms"), targets.get(key)
        figures = [_ms(found and found[q]) for q in ("p50", "p95", "p99")]
        table.add_row(name, *figures, _against(found["p95"], target) if found and target else Text(""))
    return table


def _against(value_ms: float, target_ms: float) -> Text:
    share = value_ms / target_ms
    return Text.assemble(bar(share, heat(share)), f" {share:4.0%} of {target_ms:g} ms")


def _attention(actors: list[Status]) -> Table:
    """`load`: running and waiting requests."""
    table = _grid("attention", "state", "load", "TPOT p95", "tokens/s", "a step", "KV", "FFN wait")
    for actor in actors:
        tpot = actor.get("tpot_ms")
        figures = [_ms(tpot and tpot["p95"]), *(_number(actor.get(key)) for key in ("output_tokens_s", "tokens_per_step"))]
        load = f"{actor.get('running', '-')}+{actor.get('waiting', '-')}"
        table.add_row(actor["id"], _state(actor.get("state")), load, *figures, _kv(actor), _bubble(actor))
    return table


def _ffn(actors: list[Status]) -> Table:
    table = _grid("FFN", "state", "instance", "experts", "layer", "attention wait")
    for actor in actors:
        where = str(actor.get("instance", "-")), spans(actor.get("experts") or [])
        layer = _us((actor.get("stages_us") or {}).get("ffn"))
        table.add_row(actor["id"], _state(actor.get("state")), *where, layer, _bubble(actor))
    return table


def _kv(actor: Status) -> Text:
    used, total = actor.get("kv_used"), actor.get("kv_total")
    if not total:
        return Text("-")
    share = (used or 0) / total
    return Text.assemble(bar(share, heat(share / KV_ALLOWED), SHORT_BAR), f" {share:4.0%}")


def _bubble(actor: Status) -> Text:
    share = actor.get("bubble")
    return Text("-") if share is None else Text.assemble(bar(share, "cyan", SHORT_BAR), f" {share:4.0%}")


def _stages(stages_us: dict[str, float | None]) -> Table:
    """One layer of one micro-batch; bars against the longest."""
    table = _grid("one layer", "mean", "")
    longest = max((us for us in stages_us.values() if us), default=0.0)
    for stage, us in stages_us.items():
        style = "cyan" if stage.endswith("_wait") else "magenta" if stage in ("a2f", "f2a") else "blue"
        table.add_row(stage.replace("_", " "), _us(us), bar(us / longest, style, 2 * BAR) if us else Text(""))
    return table


def _changes(status: Status, decisions: Sequence[Status]) -> list[RenderableType]:
    """The last resize, who was lost, and what the autoscaler decided: what it changed, and its last word."""
    lost = [actor for role in ("attention", "ffn") for actor in status.get(role) or [] if actor.get("state") == "dead"]
    parts: list[RenderableType] = [Text(f"{actor['id']} is lost: {actor.get('reason')}", "red") for actor in lost]
    if status.get("waiting_for"):
        parts.append(Text(f"waiting for {status['waiting_for']}", "yellow"))
    if status.get("last_resize"):
        parts.append(Text(f"last resize: {', '.join(resize_words(status['last_resize']))}"))
    acted = [decision for decision in decisions[:-1] if decision["action"] != "hold"]
    shown = [*acted, *decisions[-1:]][-LAST_DECISIONS:]
    return parts + [told.line(decision) for decision in shown]


def _grid(title: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", title_justify="left")
    table.add_column(title, no_wrap=True, style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} us"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
