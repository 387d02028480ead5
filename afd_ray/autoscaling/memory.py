"""What an autoscaler must not forget when it is restarted, as JSON values; times are seconds of the caller's clock."""

from dataclasses import dataclass, field
from typing import Any

from afd_ray.autoscaling.values import Counts, Outcome, Override, State


@dataclass(slots=True)
class Memory:
    """Of one cluster."""

    state: State = field(default_factory=dict)
    """The policy's."""
    override: Override | None = None
    last: Outcome | None = None
    """How the last resize ended, whoever asked for it."""
    asked: Counts | None = None
    """What the policy's resize that is under way leads to."""
    start_delay_s: float = 0.0
    """How long the last resize lasted that added ranks."""

    def dump(self) -> dict[str, Any]:
        """For `load`."""
        return {
            "state": self.state,
            "override": _override_values(self.override),
            "last": self.last and {"to": self.last.to, "committed": self.last.committed, "at_s": self.last.at_s},
            "asked": self.asked,
            "start_delay_s": self.start_delay_s,
        }

    @classmethod
    def load(cls, raw: dict[str, Any]) -> "Memory":
        """What `dump` gave, from JSON."""
        override, last = raw["override"], raw["last"]
        return cls(
            state=raw["state"],
            override=override and Override(Counts(*override["counts"]), override["until_s"]),
            last=last and Outcome(Counts(*last["to"]), last["committed"], last["at_s"]),
            asked=raw["asked"] and Counts(*raw["asked"]),
            start_delay_s=raw["start_delay_s"],
        )

    def override_at(self, now_s: float) -> Override | None:
        """None once it is over."""
        return self.override if self.override is not None and now_s < self.override.until_s else None

    def note_end(self, before: Counts, to: Counts, committed: bool, now_s: float, duration_s: float) -> None:
        """A resize is over."""
        self.asked = None
        self.last = Outcome(to, committed, now_s)
        if committed and (to.attention > before.attention or to.ffn > before.ffn):
            self.start_delay_s = duration_s

    def settle(self, counts: Counts, now_s: float) -> None:
        """With no resize under way and so many ranks: what became of one whose end nobody saw."""
        if self.asked is not None:
            self.last, self.asked = Outcome(self.asked, counts == self.asked, now_s), None


def _override_values(override: Override | None) -> dict[str, Any] | None:
    return override and {"counts": override.counts, "until_s": override.until_s}
