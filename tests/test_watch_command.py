"""The live view: everything fits into 80 columns, and what is out of bounds is red."""

import io
from typing import Any

import pytest
from rich.console import Console

from actors.commands.watch import bar, heat, view

ATTENTION = {
    **{"id": "attention-0", "state": "running", "running": 12, "waiting": 3, "kv_used": 980, "kv_total": 1000},
    **{"tpot_ms": {"p50": 20.0, "p95": 44.2, "p99": 60.0}, "output_tokens_s": 1300.2, "tokens_per_step": 111.2, "bubble": 0.31},
}
LOST = {"id": "attention-9", "state": "dead", "reason": "it has not answered for 1 s [silent]"}
FFN = {"id": "ffn-0", "state": "running", "instance": 0, "experts": [0, 1, 2, 5], "stages_us": {"ffn": 2345.6}, "bubble": 0.1}
STATUS = {
    "state": "resizing", "epoch": 7, "model": "demo", "attention": [ATTENTION, LOST], "ffn": [FFN],
    "output_tokens_s": 1300.2, "targets_ms": {"tpot": 50.0, "ttft": 1000.0}, "autoscaling": {"policy": "balance"},
    "tpot_ms": {"p50": 20.0, "p95": 44.2, "p99": 60.0}, "ttft_ms": {"p50": 120.0, "p95": 1440.0, "p99": 1600.0},
    "queue_wait_ms": None, "stages_us": {"attention": 1200.0, "ffn": 2345.6, "ffn_wait": None},
    "last_resize": {
        "from": {"attention": 1, "ffn": 1}, "to": {"attention": 2, "ffn": 1}, "outcome": "rolled_back", "reason": "no room",
    },
}  # fmt: skip


def decision(number: int, action: str) -> dict[str, Any]:
    counts = {"attention": 1, "ffn": 1}
    return {
        "number": number,
        "at_s": 0.0,
        "action": action,
        "before": counts,
        "wanted": counts,
        "reason": f"why {number}",
        "seen": {},
    }


def shown(status: dict[str, Any], *decisions: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(view(status, decisions))
    return stream.getvalue()


def test_nothing_is_cut_off_in_80_columns() -> None:
    text = shown(STATUS)
    assert "…" not in text
    for said in ("demo", "resizing", "epoch 7", "1A1F", "12 running, 3 waiting", "policy balance"):
        assert said in text
    for figure in (
        "44.2 ms",
        "88% of 50 ms",
        "144% of 1000 ms",
        "12+3",
        "1300.2",
        "111.2",
        "98%",
        "31%",
        "0-2,5",
        "2,346 us",
        "10%",
    ):
        assert figure in text


def test_the_lost_and_the_last_resize_are_told() -> None:
    text = shown(STATUS, width=120)
    assert "attention-9 is lost: it has not answered for 1 s [silent]" in text
    assert "last resize: 1 attention and 1 ffn to 2 attention and 1 ffn, rolled_back, no room" in text


def test_of_the_decisions_those_that_changed_something_and_the_last_are_shown() -> None:
    text = shown(STATUS, decision(1, "hold"), decision(2, "resize"), decision(3, "committed"), decision(4, "hold"))
    assert [f"why {number}" in text for number in (1, 2, 3, 4)] == [False, True, True, True]


def test_a_cluster_that_has_nothing_to_show_yet_is_shown() -> None:
    assert "starting" in shown({"state": "starting"})


@pytest.mark.parametrize(("share", "expected"), [(0.0, "────"), (0.5, "██──"), (0.53125, "██▏─"), (1.0, "████"), (1.7, "████")])
def test_a_bar_is_as_long_as_its_share(share: float, expected: str) -> None:
    assert bar(share, "red", 4).plain == expected


def test_what_is_above_its_target_is_red() -> None:
    assert [heat(share) for share in (0.5, 0.9, 1.1)] == ["green", "yellow", "red"]
