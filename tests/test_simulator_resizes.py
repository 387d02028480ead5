"""How `benchmarks.simulator` compares the resizes of a live cluster with simulated ones."""

from typing import Any

from afd_ray.autoscaling import Counts
from benchmarks._replay import Figures
from benchmarks._resizes import PERIOD_S, Move, Scaled, Step, drawn, moves_of

FIGURES = Figures(50.0, 60.0, 100.0, 200.0)
GROWTH, REDUCTION = Move(18.0, Counts(1, 1), Counts(2, 2)), Move(52.0, Counts(2, 2), Counts(1, 1))


def scaled(*simulated: Move) -> Scaled:
    return Scaled("queue", "rate", FIGURES, FIGURES, (GROWTH, REDUCTION), simulated)


def entry(action: str, at_s: float, move: Move) -> dict[str, Any]:
    return {"action": action, "at_s": at_s, "before": move.before._asdict(), "wanted": move.to._asdict()}


def test_resizes_at_nearly_the_same_times_are_alike() -> None:
    found = scaled(GROWTH._replace(at_s=17.5), REDUCTION._replace(at_s=52.0 + PERIOD_S))
    assert (found.apart_s, found.holds) == (PERIOD_S, True)


def test_one_that_comes_a_period_late_is_not() -> None:
    assert not scaled(GROWTH, REDUCTION._replace(at_s=52.5 + PERIOD_S)).holds


def test_nor_is_another_sequence() -> None:
    assert not scaled(GROWTH).holds
    assert not scaled(GROWTH._replace(to=Counts(2, 1)), REDUCTION).same


def test_nor_are_figures_too_far_off() -> None:
    off = scaled(GROWTH, REDUCTION)._replace(simulated=FIGURES._replace(tpot_p50=56.0))
    assert (off.alike, off.holds) == (True, False)


def test_resizes_are_read_from_the_decisions_with_how_long_they_took() -> None:
    entries = [
        entry("hold", 1000.0, GROWTH),
        entry("resize", 1018.0, GROWTH),
        entry("hold", 1021.0, GROWTH),
        entry("committed", 1022.5, GROWTH),
        entry("resize", 1052.0, REDUCTION),
        entry("rolled_back", 1053.0, REDUCTION),
    ]
    assert moves_of(entries, 1000.0) == ([GROWTH], [4.5])


def test_requests_of_a_step_come_in_even_distances_from_its_beginning() -> None:
    assert [arrival.at_s for arrival in drawn([Step(2, 1, 5), Step(1, 2, 9)], 30)] == [0.0, 1.0, 2.0, 2.5]
