"""When the soak benchmark calls a measure flat."""

import os

from benchmarks.soak import sample, slope, trend

TIMES_S = [float(t) for t in range(8)]


def test_what_rises_only_while_warming_up_is_flat() -> None:
    assert trend(TIMES_S, [0, 50, 100, 100, 100, 100, 100, 100], tolerance=30).flat


def test_what_goes_on_rising_is_not_flat() -> None:
    assert not trend(TIMES_S, [100, 101, 102, 103, 104, 105, 106, 107], tolerance=2).flat


def test_what_falls_is_flat() -> None:
    assert trend(TIMES_S, [9, 8, 7, 6, 5, 4, 3, 2], tolerance=1).flat


def test_the_slope_is_that_of_the_line_through_the_samples() -> None:
    assert slope([0, 1, 2], [5, 7, 9]) == 2


def test_a_sample_is_of_the_process_asked_for() -> None:
    found = sample(os.getpid(), at_s=1.5)
    assert found.at_s == 1.5
    assert min(found.resident_mb, found.descriptors, found.threads) > 0
