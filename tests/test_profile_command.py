"""`afd-ray profile`: the loads that it drives, and what it refuses."""

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from actors import profiling
from actors.cli import main
from actors.profiling import ROUNDS, Prompts, profile
from afd_ray.measured import Flights, Measured
from afd_ray.simulation.serving.profile_file import ProfileFile
from afd_ray.simulation.serving.profiling import Facts

FACTS = Facts(
    attention=1,
    ffn=1,
    layers=4,
    token_budget=128,
    max_running=8,
    context_limit=512,
    kv_tokens=8192,
    vocab_size=64,
    bytes_per_row=100,
)
LOOKS = 3
"""That requests run for."""


class Imagined:
    """A cluster whose layers last 10 us and 2 us a row in attention, 5 us and 1 us a row in the FFN."""

    def __init__(self) -> None:
        self._sums = Measured(0.0, 0.0)
        self._running: Prompts = []
        self._looks = threading.Semaphore(0)

    def measured(self) -> dict[str, Any]:
        if self._running:
            self._fly(len(self._running), 10)
            self._looks.release()
        return {"epoch": 1, "facts": asdict(FACTS), "attention": {"attention-0": self._sums.dump()}}

    def generate(self, prompts: Prompts, max_tokens: int) -> None:
        assert all(0 <= token < FACTS.vocab_size for prompt in prompts for token in prompt)
        tokens = sum(map(len, prompts))
        if max_tokens == 1:
            self._fly(tokens, 1)
            return
        self._add(prompt_tokens=tokens, running=len(prompts))
        self._running = prompts
        for _ in range(LOOKS):
            self._looks.acquire()
        self._running = []
        self._add(running=0, completions=self._sums.completions + len(prompts))

    def _fly(self, rows: int, count: int) -> None:
        attention, ffn = count * (10.0 + 2 * rows), count * (5.0 + rows)
        layers = FACTS.layers
        flown = Flights(count, count * rows, 0, attention, ffn, 0, 0.0, (*layers * (attention,), 0.0), layers * (ffn,))
        self._add(flights=self._sums.flights.plus(flown))

    def _add(self, **changes: Any) -> None:
        self._sums = Measured(**{name: changes.get(name, getattr(self._sums, name)) for name in Measured.__dataclass_fields__})


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "LOOK_S", 0.005)


def test_every_load_gives_a_point_and_the_points_are_what_the_cluster_does() -> None:
    told: list[tuple[int, int]] = []
    found = profile(Imagined(), {"of": "a test"}, lambda done, total: told.append((done, total)))
    assert {point["rows"] for point in found["attention"]} == {1, 2, 4, 8, 32, 128}
    assert all(point["us"] == 10 + 2 * point["rows"] for point in found["attention"])
    assert all(point["us"] == 5 + point["rows"] for point in found["ffn"])
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == ROUNDS * len(found["attention"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "-o", "nowhere/profile.json"], "-o: nowhere is no directory"),
        (["demo", "-o", "."], "-o: . is a directory"),
        (["demo", "--url", "http://127.0.0.1:1", "-o", "profile.json"], "leave CONFIG and --set out"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_without_a_server_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["profile", "--url", "http://127.0.0.1:1", "-o", str(tmp_path / "profile.json")]) == 1
    assert "no server at http://127.0.0.1:1" in capsys.readouterr().err


def test_the_file_is_written_and_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profiling, "Served", lambda *args: Imagined())
    path = tmp_path / "profile.json"
    assert main(["profile", "--url", "http://127.0.0.1:1", "-o", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "attention, one rank" in shown
    assert "FFN, the rows" in shown
    found = ProfileFile.read(path)
    assert {len(point.by_layer) for point in found.attention} == {FACTS.layers + 1}


def test_a_cluster_that_is_resized_meanwhile_has_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, epochs = Imagined(), iter([1, 1, 1, 1, 1, 1])
    measured = subject.measured
    monkeypatch.setattr(subject, "measured", lambda: measured() | {"epoch": next(epochs, 2)})
    with pytest.raises(RuntimeError, match="resized meanwhile"):
        profile(subject, {"of": "a test"})
