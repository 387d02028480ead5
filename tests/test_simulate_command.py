"""`afd-ray simulate`: what it prints, what it writes, what it refuses."""

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest

from actors.cli import main
from actors.commands.simulate import NO_PLOTS

ASK = ["simulate", "--config", "simulate", "--trace", "poisson:rate=1,duration_s=60,output=20", "--policy", "fixed", "queue"]


def test_it_prints_a_row_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ASK) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fixed .*\d\d\.\d\d%", printed)
    assert re.search(r"queue .*\d\d\.\d\d%", printed)


def test_a_seed_gives_the_same_again(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(seed: str) -> str:
        assert main([*ASK, "--json", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert printed("1") == printed("1")
    first, other = json.loads(printed("1")), json.loads(printed("2"))
    assert first["policies"][0]["tokens"] != other["policies"][0]["tokens"]


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    assert main([*ASK, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"?http", page)
    assert (tmp_path / "fixed.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def without_plots(name: str, globals_: Any = None, locals_: Any = None, names: Any = (), level: int = 0) -> Any:
        if "plots" in (names or ()):
            raise ImportError("no matplotlib")
        return imported(name, globals_, locals_, names, level)

    monkeypatch.setattr(builtins, "__import__", without_plots)
    assert main([*ASK, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.strip() == NO_PLOTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_fraction_in_a_trace_is_no_files_suffix(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--config", "simulate", "--trace", "poisson:duration_s=60,rate=0.5", "--policy", "fixed"]) == 0
    assert "fixed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "nothing.csv"], "nothing.csv"),
        (["--trace", "weekly"], "no kind of trace"),
        (["--trace", ""], "no kind of trace"),
        (["--trace", "poisson:rate=0.5,prompt=0.5"], "prompt must be at least 1 and at most 1e+12, got 0.5"),
        (["--policy", "clever"], "autoscaling.policy: clever is not known"),
        (["--policy", "no_such_module:policy"], "cannot be loaded"),
        (["--config", "demo"], "attention.pace and ffn.pace must be given"),
        (["--set", "simulation.nodes=[{actors: 3}]"], "simulation.nodes: no room"),
        (["--set", "simulation.profile=README.md"], "is no profile"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASK, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_a_policy_that_fails_at_every_decision_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASK, "--policy", "fixed", "os:getcwd"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"fixed .*\d\d\.\d\d%", captured.out), "the others' figures are shown all the same"
    (line,) = captured.err.strip().splitlines()
    told = re.fullmatch(r"afd-ray: os:getcwd failed at (\d+) of (\d+) decisions, .*: the policy raised TypeError: .*", line)
    assert told
    assert int(told[1]) == int(told[2]) > 0
