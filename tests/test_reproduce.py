"""The paper's figures come out of the formulas; what is printed is read for comparison alone."""

import pytest

from afd_ray.planning.reproduce import Comparison, comparisons, tokens_per_gpu_s

FOUND = list(comparisons())


def figures(table: str) -> list[Comparison]:
    return [c for c in FOUND if c.table.startswith(table)]


@pytest.mark.parametrize(
    ("table", "count"),
    [("Table 2", 36), ("Table 3", 36), ("Table 5", 8), ("Table 6", 108), ("Table 7", 4), ("Table 8", 6), ("Section 6", 11)],
)
def test_every_figure_is_computed_and_within_its_tolerance(table: str, count: int) -> None:
    assert len(figures(table)) == count
    assert [c for c in figures(table) if not c.holds] == []


def test_tolerances_are_those_asked_for() -> None:
    asked = {"Table 2": 0.01, "Table 3": 0.01, "Table 5": 0.01, "Table 6": 0.0015, "Table 7": 0.0005}
    for table, tolerance in asked.items():
        assert {c.tolerance for c in figures(table)} == {tolerance}
    assert {c.tolerance for c in figures("Table 8") if c.column == "printed"} == {0.03}


@pytest.mark.parametrize(("computed", "holds"), [(1.0, True), (1.009, True), (1.011, False), (0.98, False)])
def test_a_figure_outside_its_tolerance_does_not_hold(computed: float, holds: bool) -> None:
    assert Comparison("t", "r", "c", computed, 1.0, 0.01, "relative").holds is holds


def test_twice_the_context_on_twice_the_attention_keeps_the_step_time() -> None:
    """Section 7.3: the batch and the FFN stay, attention is scaled with the context."""
    at_4k, at_8k = tokens_per_gpu_s(2, 2, 4096, 1, 6144), tokens_per_gpu_s(4, 2, 8192, 1, 6144)
    assert at_8k == pytest.approx(at_4k * 4 / 6, rel=1e-3)
