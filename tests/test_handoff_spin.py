"""When looking for a due message pays, judged by the recent waits."""

from afd_ray.handoff.spin import Spin

SHORT_S, LONG_S = 50e-6, 5e-3


def looks(waits_s: list[float]) -> list[bool]:
    """Whether it would look, after each of these waits."""
    spin = Spin(200e-6)
    seen = []
    for waited_s in waits_s:
        spin.learn(waited_s)
        seen.append(spin.budget_s > 0)
    return seen


def test_it_looks_while_waits_are_short() -> None:
    assert looks([SHORT_S] * 3) == [True] * 3


def test_after_a_long_wait_it_sleeps_until_one_was_short() -> None:
    assert looks([LONG_S, LONG_S, SHORT_S, SHORT_S]) == [False, False, True, True]


def test_each_look_in_vain_makes_the_next_come_later() -> None:
    waits_s = [LONG_S, SHORT_S, LONG_S, SHORT_S, SHORT_S, LONG_S, SHORT_S, SHORT_S, SHORT_S, SHORT_S]
    assert looks(waits_s) == [False, True] + [False, False, True] + [False] * 4 + [True]


def test_a_bound_of_nothing_never_looks() -> None:
    spin = Spin(0.0)
    spin.learn(0.0)
    assert spin.budget_s == 0.0
