"""When looking for a due message pays, judged by the last wait."""

from afd_ray.handoff.spin import Spin


def test_it_follows_the_last_wait() -> None:
    spin = Spin(200e-6)
    budgets = []
    for waited_s in (50e-6, 5e-3, 1e-3, 150e-6):
        spin.learn(waited_s)
        budgets.append(spin.budget_s)
    assert budgets == [200e-6, 0.0, 0.0, 200e-6]


def test_a_bound_of_nothing_never_spins() -> None:
    spin = Spin(0.0)
    spin.learn(0.0)
    assert spin.budget_s == 0.0
