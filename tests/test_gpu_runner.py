"""What runs all that a GPU machine is for, with stand-ins for its parts."""

import importlib.util
import os
import select
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import ORDER, Part, main, parts_of, run_all

MACHINE = "NVIDIA H100 80GB HBM3, driver 1"
SAYS = "print('| a table |')"
FAILS = "import sys; print('it went wrong'); sys.exit(3)"
HANGS = ["sh", "-c", "sleep 600 & echo so far $!; wait"]


def part(name: str, code: str, limit_s: float = 60.0, **more: object) -> Part:
    return Part(name, [sys.executable, "-c", code], limit_s)._replace(**more)


def run(parts: list[Part], results: Path, seconds: float = 300.0) -> int:
    return run_all(parts, results, seconds, machine=MACHINE)


def test_what_becomes_of_a_part_does_not_concern_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part("gpu_one", FAILS), part("gpu_two", "", 1.0, command=HANGS), part("gpu_three", SAYS)]
    assert run(parts, tmp_path) == 1
    one, two, three = ((tmp_path / f"{each.name}.md").read_text() for each in parts)
    assert one.startswith("# gpu_one\n\nNVIDIA H100 80GB HBM3, driver 1, 20")
    assert "failed with 3 after" in one
    assert one.endswith("\n\nit went wrong\n")
    assert "ended after 1 s, its limit" in two
    assert three.endswith("\n\n| a table |\n")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["gpu_one", "gpu_two", "gpu_three"]
    assert has_ended(int(two.rsplit("so far ", 1)[1])), "a part's own processes end with it"


def has_ended(pid: int) -> bool:
    """In a moment at most."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 10)[0])
    finally:
        os.close(process)


def test_when_the_time_is_over_no_part_is_begun_and_what_is_written_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu_two.md").write_text("of an earlier run")
    times = iter([0.0, 1.0, 296.0])
    parts = [part("gpu_one", SAYS), part("gpu_two", SAYS)]
    assert run_all(parts, tmp_path, 300.0, clock=lambda: next(times), machine=MACHINE) == 1
    assert (tmp_path / "gpu_one.md").exists()
    assert (tmp_path / "gpu_two.md").read_text() == "of an earlier run"
    assert capsys.readouterr().out.splitlines()[1] == "gpu_two: not begun: no time was left"


def test_all_well_is_zero_and_what_is_no_table_is_quoted(tmp_path: Path) -> None:
    quoted = part("gpu_tests", "import os; print(os.environ['TRITON_INTERPRET'])", environment={"TRITON_INTERPRET": "0"})
    assert run([part("gpu_one", SAYS), quoted._replace(is_table=False)], tmp_path) == 0
    assert (tmp_path / "gpu_tests.md").read_text().endswith("\n\n```\n0\n```\n")


def test_times_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    times = tmp_path / "gpu" / "gpu_one.json"
    times.parent.mkdir()
    times.write_text("old")
    assert run([part("gpu_one", FAILS, times=times)], tmp_path) == 1
    assert not times.exists()


def test_without_a_gpu_it_says_so_and_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = part("gpu_probe", "import sys; print('no CUDA GPU here', file=sys.stderr); sys.exit(2)")
    assert run([absent, part("gpu_one", SAYS)], tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "no CUDA GPU here"
    assert not list(tmp_path.glob("*.md"))


def test_every_gpu_benchmark_is_a_part_and_little_time_makes_them_short(tmp_path: Path) -> None:
    parts = {each.name: each for each in parts_of(tmp_path, quick=True)}
    assert list(parts)[: len(ORDER)] == list(ORDER)
    assert set(parts) == {file.stem for file in Path(gpu.__file__).parent.glob("gpu_*.py")} | {"gpu_tests"}
    assert all("--quick" in each.command for name, each in parts.items() if name != "gpu_tests")
    assert parts["gpu_step"].command[-2:] == ["--json", str(tmp_path / "gpu" / "gpu_step.json")]
    asked = {"-c", "/dev/null", "--noconftest", "--continue-on-collection-errors", "tests/test_gpu_linear.py"}
    assert asked <= set(parts["gpu_tests"].command)
    assert parts["gpu_tests"].environment == {"TRITON_INTERPRET": "0"}
    assert not any("--quick" in each.command for each in parts_of(tmp_path, quick=False))


@pytest.mark.parametrize("installed", [True, False])
def test_tests_run_in_several_processes_where_pytest_can_do_that(
    installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    (tests,) = (each for each in parts_of(tmp_path, quick=True) if each.name == "gpu_tests")
    assert ("-n" in tests.command) is installed


def test_parts_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[list[str], float]] = []
    monkeypatch.setattr(
        gpu, "run_all", lambda parts, results, seconds: asked.append(([each.name for each in parts], seconds)) or 0
    )
    assert main(["--only", "gpu_step", "--minutes", "9", "--results", str(tmp_path)]) == 0
    assert asked == [(["gpu_step"], 540.0)]
    with pytest.raises(SystemExit):
        main(["--only", "gpu_nothing"])
    assert "--only: must be of gpu_probe, gpu_tests" in capsys.readouterr().err
