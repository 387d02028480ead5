"""What actors would have measured, for tests."""

from dataclasses import replace
from typing import Any

from afd_ray.histogram import Histogram
from afd_ray.measured import Flights, Measured, MeasuredFFN


def histogram(*values: float) -> Histogram:
    out = Histogram()
    for value in values:
        out.add(value)
    return out


def rank(at_s: float, flights: Flights | None = None, wait_us: float = 0.0, **sums: Any) -> Measured:
    """An attention rank that started at 0."""
    stages = {"attention_wait": histogram(wait_us)} if wait_us else {}
    return replace(Measured(0.0, at_s, flights=flights or Flights(), stages=stages), **sums)


def ffn_rank(at_s: float, wait_us: float = 0.0) -> MeasuredFFN:
    return MeasuredFFN(0.0, at_s, stages={"ffn_wait": histogram(wait_us)} if wait_us else {})


def status(role: str, at_s: float, **sums: Any) -> dict[str, Any]:
    """As an actor answers `status`, as far as the autoscaler reads it."""
    if role == "ffn":
        return {"measured": ffn_rank(at_s).dump()}
    measured = rank(at_s, **sums)
    return {"measured": measured.dump(), "recent": measured.dump(), "micro_batches": 1}
