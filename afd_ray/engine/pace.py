"""Pacing: a stage that is over early waits until it has lasted what a slower or faster machine's profile says."""

import time
from typing import Protocol

SPIN_NS = 200_000
"""The end of a wait is spun, because a sleep overshoots."""


class Pace(Protocol):
    """A stage-time profile."""

    def duration_us(self, rows: int, context_tokens: int = 0) -> float:
        """How long the stage of `rows` rows over `context_tokens` cached tokens in all lasts."""
        ...


def hold(pace: Pace | None, started_ns: int, rows: int, context_tokens: int = 0) -> None:
    """Return when the stage begun at `started_ns` (monotonic) has lasted as the profile says; at once without one."""
    if pace is None:
        return
    end_ns = started_ns + int(pace.duration_us(rows, context_tokens) * 1000)
    left_ns = end_ns - time.monotonic_ns()
    if left_ns > SPIN_NS:
        time.sleep((left_ns - SPIN_NS) / 1e9)
    while time.monotonic_ns() < end_ns:
        pass
