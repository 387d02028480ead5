"""How a policy did on a trace."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from afd_ray.autoscaling.values import Counts
from afd_ray.simulation.serving.measures import Point, Tally


class Change(NamedTuple):
    """A resize as it ended."""

    at_s: float
    before: Counts
    after: Counts
    """What was wanted, where it was rolled back."""
    outcome: str
    """committed, rolled_back, or lost: an actor failed."""
    reason: str


class Failures(NamedTuple):
    """Of a policy: the decisions that the guard had to make in its place."""

    failed: int = 0
    decisions: int = 0
    """In all."""
    last: str = ""
    """What was wrong."""

    def plus(self, failed: bool, reason: str) -> "Failures":
        """With one decision more."""
        return Failures(self.failed + failed, self.decisions + 1, reason if failed else self.last)

    @property
    def always(self) -> bool:
        """What such a policy scores is what no policy would."""
        return 0 < self.failed == self.decisions

    def __str__(self) -> str:
        return f"failed at {self.failed} of {self.decisions} decisions, which then changed nothing: {self.last}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one simulation."""

    policy: str
    tally: Tally
    duration_s: float
    gpu_hours: float
    """Of all actors from when they are asked for to when they are gone."""
    changes: tuple[Change, ...]
    points: tuple[Point, ...]
    preemptions: int
    unfinished: int
    failures: Failures

    @property
    def attainment(self) -> float:
        """Share of all requests that met both targets; refused and unfinished ones did not."""
        return self.tally.within / self.tally.arrivals if self.tally.arrivals else 1.0

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        tally, committed = self.tally, [change for change in self.changes if change.outcome == "committed"]
        return {
            "policy": self.policy,
            "gpu_hours": round(self.gpu_hours, 3),
            "slo_attainment": round(self.attainment, 5),
            "tpot_ms": _named(tally.request_tpot_ms.quantiles(0.5, 0.95, 0.99)),
            "token_gap_ms": _named(tally.tpot_ms.quantiles(0.5, 0.95, 0.99)),
            "ttft_ms": _named(tally.ttft_ms.quantiles(0.5, 0.95, 0.99)),
            "requests": tally.arrivals,
            "completed": tally.completions,
            "refused": tally.rejected,
            "unfinished": self.unfinished,
            "tokens": tally.tokens,
            "tokens_per_gpu_s": round(tally.tokens / (self.gpu_hours * 3600), 3) if self.gpu_hours else None,
            "duration_s": round(self.duration_s, 3),
            "resizes": len(committed),
            "rolled_back": sum(change.outcome == "rolled_back" for change in self.changes),
            "reversals": reversals(committed),
            "preemptions": self.preemptions,
            "failed_decisions": self.failures.failed,
        }


def reversals(changes: Sequence[Change]) -> int:
    """How often a role's count turned round: grew after it shrank, or shrank after it grew."""
    turns = 0
    for role in ("attention", "ffn"):
        steps = [getattr(change.after, role) - getattr(change.before, role) for change in changes]
        signs = [step > 0 for step in steps if step]
        turns += sum(one != other for one, other in pairwise(signs))
    return turns


def _named(values: tuple[float, ...] | None) -> dict[str, float] | None:
    return {name: round(value, 3) for name, value in zip(("p50", "p95", "p99"), values, strict=True)} if values else None
