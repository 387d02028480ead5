"""What a policy sees, what it remembers, and what it answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from afd_ray.config import Autoscaling
from afd_ray.engine.stage_costs import StageCosts

State = Mapping[str, Any]
"""What a policy remembers from one decision to the next: JSON values, so that it outlives the controller."""


class Counts(NamedTuple):
    """Ranks of each role."""

    attention: int
    ffn: int

    def __str__(self) -> str:
        return f"{self.attention}A{self.ffn}F"


LEAST, MOST = Counts(1, 1), Counts(4, 4)


class Quantiles(NamedTuple):
    """Of latencies in milliseconds."""

    p50: float
    p95: float
    p99: float


class Stages(NamedTuple):
    """Microseconds of one layer of one micro-batch, means since the last observation."""

    attention: float
    """Of the slowest attention rank: the others wait for it."""
    ffn: float
    transfer: float
    """Both ways together."""
    attention_wait: float
    """Of each layer of all micro-batches, how long attention had nothing to do."""
    ffn_wait: float


class Resize(NamedTuple):
    """A change that is under way."""

    to: Counts
    since_s: float


class Outcome(NamedTuple):
    """How the last change ended."""

    to: Counts
    committed: bool
    at_s: float


class Override(NamedTuple):
    """An operator has set the counts by hand, and policies leave them alone until then."""

    counts: Counts
    until_s: float


@dataclass(frozen=True, slots=True)
class Goals:
    """What is asked of the policy: the configuration's `autoscaling` section."""

    tpot_ms: float = 50.0
    ttft_ms: float = 1000.0
    least: Counts = LEAST
    most: Counts = MOST
    ffn_step: int = 1
    """FFN ranks come and go by so many: the tensor-parallel ranks of an instance."""
    resize_deadline_s: float = 600.0
    """A resize that lasts longer is given up."""
    options: Mapping[str, float] = field(default_factory=dict)
    """The policy's own settings."""

    @classmethod
    def of(cls, scaling: Autoscaling, ffn_step: int) -> "Goals":
        """As configured."""
        return cls(
            tpot_ms=scaling.tpot_target_ms,
            ttft_ms=scaling.ttft_target_ms,
            least=Counts(scaling.min.attention, scaling.min.ffn),
            most=Counts(scaling.max.attention, scaling.max.ffn),
            ffn_step=ffn_step,
            resize_deadline_s=scaling.resize_deadline_s,
            options=scaling.options,
        )

    def bound(self, counts: Counts) -> Counts:
        """The nearest counts within the bounds; FFN ranks rounded up to whole instances."""
        ffn = -(-counts.ffn // self.ffn_step) * self.ffn_step
        low, high = self.least, self.most
        return Counts(
            min(max(counts.attention, low.attention), high.attention),
            min(max(ffn, -(-low.ffn // self.ffn_step) * self.ffn_step), high.ffn // self.ffn_step * self.ffn_step),
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """A cluster at one moment, and what it did since the last observation. None: there was nothing to measure."""

    counts: Counts
    """What serves now."""
    goals: Goals
    running: int = 0
    """Requests that decode or compute their prompt."""
    waiting: int = 0
    """Requests that are not admitted yet."""
    context_tokens: int = 0
    """Cached tokens of the running requests, in all."""
    kv_used: float = 0.0
    """Share of the KV blocks that is taken, 0 to 1, in the fullest attention rank."""
    arrivals_s: float = 0.0
    """Requests that came, a second."""
    prompt_tokens_s: float = 0.0
    output_tokens_s: float = 0.0
    """Tokens that went out, a second."""
    completions_s: float = 0.0
    """Requests that ended, a second."""
    late_s: float = 0.0
    """Of these, the ones whose first token, or whose tokens on average, came later than their target."""
    queue_wait_s: float | None = None
    """How long the oldest waiting request has waited."""
    tpot_mean_ms: float | None = None
    """From token to token, since the last observation; the quantiles below are over a minute."""
    tpot_ms: Quantiles | None = None
    ttft_ms: Quantiles | None = None
    stages: Stages | None = None
    costs: StageCosts | None = None
    """What a layer costs with the present counts, as learned from the stages that ran (`learning.StageBook`): attention and transfer by one attention rank's rows and
    context, the FFN by the rows of all attention ranks."""
    layers: int = 1
    micro_batches: int = 1
    """In flight at most, for each attention rank."""
    start_delay_s: float = 0.0
    """From the decision for another actor until it serves, as last seen."""
    resize: Resize | None = None
    last_resize: Outcome | None = None
    override: Override | None = None
    """None: nobody has set the counts, or long ago."""

    @property
    def requests(self) -> int:
        """Running and waiting."""
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class Decision:
    """The counts wanted from now on, and why."""

    counts: Counts
    reason: str
    """One line, for people."""
    state: State = field(default_factory=dict)
    """What the policy is given the next time."""
    give_up: bool = False
    """Roll back the resize that is under way."""
    failed: bool = False
    """The guard's: the policy gave no sound answer, and `reason` says why."""


Policy = Callable[[Observation, State, float], Decision]
"""(observation, state, now in seconds of any one clock) -> decision. A pure function: same arguments, same answer."""
