"""How the resize benchmark judges: slow-down beyond the cores that starting processes take, and what is asked."""

import itertools
import os

import pytest

from benchmarks.chaos.clients import Clients
from benchmarks.chaos.schedule import Shape
from benchmarks.resize import START, WAY, Row, Spell, slower, verdicts

CORES = float(os.cpu_count() or 1)


def row(calm: Spell, preparing: Spell) -> Row:
    return Row(Shape(1, 1, 1), Shape(2, 1, 1), "committed", 40.0, 1.5, 90.0, calm, preparing)


@pytest.mark.parametrize(
    ("tokens", "starting", "expected"),
    [(50, 0.0, 0.0), (25, 0.5, 0.0), (20, 0.5, 0.2), (25, 0.0, 0.5), (0, 0.5, 1.0)],
    ids=["as before", "all explained", "more than explained", "nothing explained", "none at all"],
)
def test_cores_of_starting_processes_explain_their_share(tokens: int, starting: float, expected: float) -> None:
    calm = Spell(3.0, 150, CORES, 0.0)
    assert slower([row(calm, Spell(1.0, tokens, CORES, starting * CORES))]) == pytest.approx(expected)


def test_free_cores_are_taken_first() -> None:
    calm = Spell(3.0, 150, CORES / 2, 0.0)
    assert slower([row(calm, Spell(1.0, 50, CORES, CORES / 2))]) == pytest.approx(0.0)


def test_short_spells_count_as_much_as_they_last() -> None:
    calm = Spell(3.0, 150, CORES, 0.0)
    assert slower([row(calm, Spell(0.2, 0, CORES, 0.0)), row(calm, Spell(0.8, 40, CORES, 0.0))]) == pytest.approx(0.2)


def test_what_no_resize_was_about_is_not_judged() -> None:
    calm = Spell(3.0, 150, CORES, 0.0)
    judged = verdicts([row(calm, Spell(1.0, 50, CORES, 0.0))], Clients("", "", [], [], hung_after_s=1.0))
    assert [what for what in judged if "slower" in what] == ["within 20% slower, where processes start"]


def test_the_way_is_twenty_resizes_and_ends_where_it_began() -> None:
    assert len(WAY) == 20
    assert WAY[-1] == START
    assert all(before != to for before, to in itertools.pairwise([START, *WAY]))
