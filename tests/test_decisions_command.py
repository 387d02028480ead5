"""`afd-ray decisions`: what a server recorded, as lines and as JSON."""

import json
from typing import Any

import pytest

from actors.cli import main
from actors.commands.decisions import line


def decision(number: int, action: str, wanted: int, reason: str, **seen: Any) -> dict[str, Any]:
    counts = {"before": {"attention": 1, "ffn": 2}, "wanted": {"attention": wanted, "ffn": 2}}
    return {"number": number, "at_s": 1e9, "policy": "balance", "action": action, "reason": reason, "seen": seen, **counts}


DECISIONS = [decision(1, "hold", 1, "all well"), decision(2, "resize", 3, "9 requests"), decision(3, "committed", 3, "in 4.0 s")]


class FakeServer:
    """Stands for `ask`: has one decision more at each call after the first."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, args: Any, path: str) -> dict[str, Any]:
        self.asked.append(path)
        after = int(path.partition("after=")[2] or 0)
        return {"policy": "balance", "decisions": DECISIONS[after : len(self.asked)]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr("actors.commands.decisions.ask", server)
    return server


def interrupt_after(periods: int, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[float] = []

    def sleep(period_s: float) -> None:
        passed.append(period_s)
        if len(passed) == periods:
            raise KeyboardInterrupt

    monkeypatch.setattr("actors.commands.decisions.time.sleep", sleep)


def test_a_line_says_what_was_done_and_why() -> None:
    assert line(DECISIONS[0]).plain.split(maxsplit=1)[1] == "1A2F          hold         all well"
    text = line(decision(4, "rolled_back", 3, "no room", requests=9, tpot_p95_ms=12.34)).plain
    assert "1A2F to 3A2F  rolled back  no room [9 requests, TPOT p95 12.3 ms]" in text


def test_json_is_what_the_server_answered(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decisions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"policy": "balance", "decisions": DECISIONS[:1]}


def test_without_decisions_the_policy_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("actors.commands.decisions.ask", lambda args, path: {"policy": "fixed", "decisions": []})
    assert main(["decisions"]) == 0
    assert capsys.readouterr().out == "no decisions yet; the policy is fixed\n"


@pytest.mark.parametrize("form", [["--json"], []])
def test_following_shows_each_decision_once(
    form: list[str], server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_after(4, monkeypatch)
    assert main(["decisions", "--follow", *form]) == 0
    assert server.asked == ["/admin/decisions", *(f"/admin/decisions?after={number}" for number in (1, 2, 3))]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert not form or [json.loads(told) for told in lines] == DECISIONS
