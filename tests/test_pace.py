"""Pacing: a stage lasts at least what its profile says, however early it was over."""

import pytest

from afd_ray.config import Pace
from afd_ray.engine import pace


class FakeTime:
    """A clock that only moves when somebody looks at it or sleeps."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.slept_s = 0.0

    def monotonic_ns(self) -> int:
        self.now_ns += 10
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds
        self.now_ns += int(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(pace, "time", fake)
    return fake


def test_a_stage_lasts_what_the_profile_says(clock: FakeTime) -> None:
    profile = Pace(base_us=300.0, per_row_us=2.0, per_context_token_us=0.1)
    pace.hold(profile, started_ns=0, rows=100, context_tokens=5000)
    assert clock.now_ns == pytest.approx(1_000_000, rel=1e-3)
    assert clock.slept_s == pytest.approx(800e-6, rel=1e-2)


def test_a_stage_that_is_late_already_is_not_held(clock: FakeTime) -> None:
    clock.now_ns = 2_000_000
    pace.hold(Pace(base_us=1000.0), started_ns=0, rows=1)
    assert clock.slept_s == 0
    pace.hold(None, started_ns=0, rows=1)
    assert clock.slept_s == 0
