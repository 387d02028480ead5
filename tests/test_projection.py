"""Measured stage times into what the paper's deployments would do."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.cli import main
from afd_ray.planning.measured import AttentionTime, FfnTime, HandoffTime, Measured, estimate, read_measured
from afd_ray.planning.projection import Projection, projections

PAPER = {
    "device": "NVIDIA H800",
    "source": "arXiv:2507.19427 Table 9 (attention), StepMesh's emulation of the FFN and its message times",
    "attention": [
        {"rows": 64, "context": context, "cache_bytes": 2, "part": "layer", "us": us}
        for context, us in ((8192, 281), (32768, 791))
    ],
    "ffn": [{"rows": 2048, "ranks": 16, "part": "layer", "us": 260}],
    "handoff": [{"message_bytes": 128 * 7168, "us": 18}, {"message_bytes": 2 * 128 * 7168, "us": 37}],
}
"""The times that its authors give: no more is known of its stages."""


def written(directory: Path, values: Any, name: str = "times.json") -> Path:
    file = directory / name
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return file


def projected(measured: Measured) -> list[Projection]:
    return list(projections(measured))


def test_the_paper_s_own_times_give_the_paper_s_figures() -> None:
    found = projected(Measured.model_validate(PAPER))
    assert [p.paper_tokens_per_gpu_s for p in found] == [4039, 3321, 2643]
    assert all(abs(p.deviation) < 0.03 for p in found), [p.deviation for p in found]
    assert all(p.performance.slowest == "FFN stage" for p in found)
    assert all(p.performance.tpot_ms < 50 for p in found)


def test_a_stage_is_measured_extended_or_assumed() -> None:
    attention = AttentionTime(rows=128, context=4096, cache_bytes=1, part="layer", us=200)
    bases = [
        {part.what: part.basis for part in p.parts} for p in projected(Measured(device="H100", source="", attention=(attention,)))
    ]
    assert [found["attention layer"] for found in bases] == ["measured", "extended", "measured"]
    assert all(found["FFN layer"] == found["rows to FFN"] == found["rows back"] == "assumed" for found in bases)


def test_what_a_core_or_one_rank_s_experts_leave_out_is_assumed() -> None:
    core = AttentionTime(rows=128, context=4096, cache_bytes=1, part="core", us=90)
    routed = FfnTime(rows=2048, ranks=16, part="routed", us=120)
    first = projected(Measured(device="H100", source="", attention=(core,), ffn=(routed,)))[0]
    parts = {part.what: part for part in first.parts}
    assert parts["attention core"].us == 90
    assert parts["routed experts"].us == 120
    assert parts["projections"].basis == parts["shared expert, exchange in the server"].basis == "assumed"
    assert first.performance.times_us.ffn == pytest.approx(120 + parts["shared expert, exchange in the server"].us)


def test_a_layer_goes_before_a_core_and_other_ranks_do_not_count() -> None:
    core = AttentionTime(rows=128, context=4096, cache_bytes=1, part="core", us=90)
    times = (core, core.model_copy(update={"part": "layer", "us": 150}))
    other = FfnTime(rows=2048, ranks=8, part="layer", us=1)
    first = projected(Measured(device="H100", source="", attention=times, ffn=(other,)))[0]
    assert first.performance.times_us.attention == 150
    assert first.performance.times_us.ffn > 100


def test_a_card_sends_to_each_server_in_turn() -> None:
    handoff = (HandoffTime(message_bytes=128 * 7168, us=20), HandoffTime(message_bytes=2 * 128 * 7168, us=40))
    first, *_ = projected(Measured(device="H100", source="", handoff=handoff))
    assert first.performance.times_us.a2f == 2 * 20
    assert first.performance.times_us.f2a == 2 * 40


@pytest.mark.parametrize(
    ("points", "at", "expected"),
    [
        ([(10, 5)], 20, (10, False)),
        ([(10, 5)], 10, (5, True)),
        ([(10, 5), (20, 15)], 15, (10, True)),
        ([(20, 15), (10, 5)], 30, (25, False)),
        ([(10, 5), (20, 15), (30, 20)], 40, (25, False)),
        ([(10, 5), (20, 9)], 5, (3, False)),
        ([(10, 6), (20, 15)], 5, (3, False)),  # the line would be at 1.5
        ([(10, 6), (20, 15)], 1, (0.6, False)),
        ([(10, 6), (20, 5)], 40, (5, False)),
        ([(10, 5), (10, 7), (10, 9)], 10, (7, True)),
    ],
)
def test_times_lie_on_lines_through_the_points(
    points: list[tuple[float, float]], at: float, expected: tuple[float, bool]
) -> None:
    assert estimate(points, at) == pytest.approx(expected)


def test_a_directory_is_all_its_files(tmp_path: Path) -> None:
    written(tmp_path, PAPER | {"ffn": [], "handoff": []}, "a.json")
    written(tmp_path, PAPER | {"attention": [], "source": "another"}, "b.json")
    together = read_measured(tmp_path)
    assert (len(together.attention), len(together.ffn), len(together.handoff)) == (2, 1, 2)
    assert together.source.endswith("; another")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("{", "not valid JSON"),
        (PAPER | {"speed": 1}, "speed: "),
        (PAPER | {"device": "GeForce"}, "device: must name one of H800, "),
        (PAPER | {"model": "step4"}, "did you mean step3"),
        (PAPER | {"ffn": [{"rows": 2048, "ranks": 16, "part": "layer", "us": -1}]}, "ffn.0.us: "),
        ({"device": "H100", "source": ""}, "no stage time"),
    ],
)
def test_a_bad_file_is_one_line(values: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, values)
    assert main(["plan", "--measured", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert expected in captured.err
    assert str(file) in captured.err


def test_files_of_two_devices_and_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.json file"):
        read_measured(tmp_path)
    written(tmp_path, PAPER, "a.json")
    written(tmp_path, PAPER | {"device": "NVIDIA H20"}, "b.json")
    with pytest.raises(ValueError, match=r"b\.json: NVIDIA H20, step3, but .*a\.json is of NVIDIA H800"):
        read_measured(tmp_path)
    with pytest.raises(ValueError, match="No such file"):
        read_measured(tmp_path / "c.json")


def test_the_command_keeps_measured_and_assumed_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, PAPER | {"handoff": []})
    assert main(["plan", "--measured", str(file)]) == 0
    text = capsys.readouterr().out
    measured, assumed = text.index("Measured, us a layer"), text.index("Assumed, us a layer")
    assert measured < text.index("attention layer") < assumed < text.index("rows to FFN")
    for figure in ("4,039", "3,321", "2,643"):
        assert figure in text
    assert main(["plan", "--measured", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"][:4] for row in told["deployments"]] == ["2A2F", "3A2F", "4A2F"]
    assert {part["basis"] for part in told["deployments"][0]["parts"]} == {"measured", "extended", "assumed"}
