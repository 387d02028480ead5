"""The record of an autoscaler's decisions: bounded, and in a form that can be kept elsewhere entry by entry."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from afd_ray.autoscaling.values import Counts, Observation

Action = Literal["hold", "resize", "give_up", "by_hand", "committed", "rolled_back", "refused"]
KEPT = 256
"""Of decisions to leave all as it is, and as many of all others: what was changed is not crowded out by what was not."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision, or how a resize ended."""

    number: int
    """Counts up from 1, through restarts too."""
    at_s: float
    """Since 1970."""
    policy: str
    action: Action
    before: Counts
    wanted: Counts
    reason: str
    seen: Mapping[str, float | int | None]
    """What `figures` gives of the observation; empty where there was none."""

    def dump(self) -> dict[str, Any]:
        """As `GET /admin/decisions` shows it."""
        return asdict(self) | {"before": self.before._asdict(), "wanted": self.wanted._asdict()}

    @classmethod
    def load(cls, raw: Mapping[str, Any]) -> "Entry":
        """What `dump` gave."""
        return cls(**{**raw, "before": Counts(**raw["before"]), "wanted": Counts(**raw["wanted"])})


class Record:
    """The last entries, in their order."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        ordered = sorted(entries, key=lambda entry: entry.number)
        self._held = deque((entry for entry in ordered if entry.action == "hold"), KEPT)
        self._done = deque((entry for entry in ordered if entry.action != "hold"), KEPT)
        self.last = ordered[-1] if ordered else None

    @property
    def next_number(self) -> int:
        return self.last.number + 1 if self.last else 1

    def add(self, entry: Entry) -> Entry | None:
        """Gives the one that had to make room."""
        self.last = entry
        kind = self._held if entry.action == "hold" else self._done
        crowded_out = kind[0] if len(kind) == KEPT else None
        kind.append(entry)
        return crowded_out

    def after(self, number: int) -> list[Entry]:
        """Those with a higher number, in their order."""
        return sorted((entry for entry in (*self._held, *self._done) if entry.number > number), key=lambda entry: entry.number)


def figures(observation: Observation) -> dict[str, float | int | None]:
    """What of an observation is kept with a decision."""
    tpot, ttft = observation.tpot_ms, observation.ttft_ms
    return {
        "requests": observation.requests,
        "waiting": observation.waiting,
        "context_tokens": observation.context_tokens,
        "kv_used": round(observation.kv_used, 3),
        "output_tokens_s": round(observation.output_tokens_s, 2),
        "tpot_mean_ms": observation.tpot_mean_ms and round(observation.tpot_mean_ms, 2),
        "tpot_p95_ms": round(tpot.p95, 2) if tpot else None,
        "ttft_p95_ms": round(ttft.p95, 2) if ttft else None,
    }
