"""How the resize benchmark judges: slow-down beyond the cores that starting processes take, and what is asked."""

import itertools
import os

import pytest

from benchmarks.chaos.schedule import Shape
from benchmarks.resize import START, WAY, Row, Spell

CORES = float(os.cpu_count() or 1)


def row(calm: Spell, preparing: Spell) -> Row:
    return Row(Shape(1, 1, 1), Shape(2, 1, 1), "committed", 40.0, 1.5, 90.0, calm, preparing)


@pytest.mark.parametrize(
    ("step_ms", "starting", "expected"),
    [(20.0, 0.0, 0.0), (40.0, 0.5, 0.0), (50.0, 0.5, 0.2), (40.0, 0.0, 0.5)],
    ids=["as before", "all explained", "more than explained", "nothing explained"],
)
def test_cores_of_starting_processes_explain_their_share(step_ms: float, starting: float, expected: float) -> None:
    calm = Spell(3.0, 20.0, CORES, 0.0)
    assert row(calm, Spell(1.0, step_ms, CORES, starting * CORES)).slower == pytest.approx(expected)


def test_free_cores_are_taken_first() -> None:
    calm = Spell(3.0, 20.0, CORES / 2, 0.0)
    assert row(calm, Spell(1.0, 20.0, CORES, CORES / 2)).slower == pytest.approx(0.0)


def test_the_way_is_twenty_resizes_and_ends_where_it_began() -> None:
    assert len(WAY) == 20
    assert WAY[-1] == START
    assert all(before != to for before, to in itertools.pairwise([START, *WAY]))
