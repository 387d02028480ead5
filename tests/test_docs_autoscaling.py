"""The worked examples of docs/autoscaling.md run as they stand there."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from actors.cli import main

DOC = (Path(__file__).parent.parent / "docs" / "autoscaling.md").read_text()


def blocks(language: str, section: str) -> list[str]:
    text = next(part for part in DOC.split("\n## ") if part.startswith(section))
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def policy_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks("python", "Write a policy"):
        exec(compile(block, "docs/autoscaling.md", "exec"), names)
    return names


def test_the_written_policy_runs_beside_ours(policy_names: dict[str, Any]) -> None:
    assert policy_names["outcome"].attainment > 0.9
    assert policy_names["by_context"].__doc__


def test_the_swept_ratio_has_its_best_in_between(policy_names: dict[str, Any]) -> None:
    names = dict(policy_names)
    for block in blocks("python", "Sweep a ratio"):
        exec(compile(block, "docs/autoscaling.md", "exec"), names)
    assert names["best"] == min(names["reached"], key=names["reached"].__getitem__)
    assert max(names["reached"].values()) > 2 * min(names["reached"].values())


def test_the_replayed_trace_leaves_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    requests = [{"timestamp": 500 * n, "input_length": 800, "output_length": 100, "hash_ids": []} for n in range(200)]
    Path("trace.jsonl").write_text("\n".join(map(json.dumps, requests)) + "\n")
    (command,) = blocks("bash", "Replay a trace")
    assert main(shlex.split(command)[1:]) == 0
    assert "balance" in capsys.readouterr().out
    report = json.loads(Path("report/report.json").read_text())
    assert [policy["completed"] for policy in report["policies"]] == [200, 200]
    assert {path.name for path in Path("report").iterdir()} >= {
        "report.html",
        "balance.png",
        "fixed.png",
        "cost-and-attainment.png",
    }
