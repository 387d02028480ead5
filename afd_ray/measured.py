"""What an actor has measured, as sums since its start: readers take differences between two looks, so that none disturbs another."""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import starmap, zip_longest
from typing import Any

from afd_ray.histogram import Histogram

STAGES = ("attention", "ffn", "a2f", "f2a", "attention_wait", "ffn_wait")
"""What an attention actor sees of them is attention, f2a and attention_wait; an FFN actor the others; a colocated one attention and ffn."""
_BUSY, _WAITS = ("attention", "head", "ffn"), ("attention_wait", "ffn_wait")

StagesUs = Mapping[str, Histogram]
"""Durations in microseconds by stage."""


@dataclass(frozen=True, slots=True)
class Flights:
    """Sums over the micro-batches that passed all layers."""

    count: int = 0
    rows: int = 0
    context_tokens: int = 0
    attention_us: float = 0.0
    """Of each its mean layer: divided by `count` it is one layer of one micro-batch. So is `ffn_us`."""
    ffn_us: float = 0.0
    transfers: int = 0
    """Layers whose transfer could be told from waiting."""
    transfer_us: float = 0.0
    """Of these, both ways together."""
    attention_by_layer_us: tuple[float, ...] = ()
    """Layer after layer, and then the head."""
    ffn_by_layer_us: tuple[float, ...] = ()
    attention_changes_us: float = 0.0
    """How far each layer's duration was from that in the slot's micro-batch before, where that had as many rows."""
    attention_compared_us: float = 0.0
    """Of those pairs both durations together."""
    ffn_changes_us: float = 0.0
    ffn_compared_us: float = 0.0

    @property
    def attention_spread(self) -> float:
        """How much a layer differs from micro-batch to micro-batch: the Gini coefficient of its durations, 0 to 1. Drifts have no part in it."""
        return self.attention_changes_us / self.attention_compared_us if self.attention_compared_us else 0.0

    @property
    def ffn_spread(self) -> float:
        return self.ffn_changes_us / self.ffn_compared_us if self.ffn_compared_us else 0.0

    def plus(self, other: "Flights") -> "Flights":
        return self._with(other, operator.add)

    def minus(self, earlier: "Flights") -> "Flights":
        return self._with(earlier, operator.sub)

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> "Flights":
        """From JSON values of its fields."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in dumped.items()}
        return cls(**values)

    def _with(self, other: "Flights", combine: Callable[[Any, Any], Any]) -> "Flights":
        layers = (
            tuple(starmap(combine, zip_longest(mine, others, fillvalue=0.0)))
            for mine, others in zip(self._by_layer, other._by_layer, strict=True)
        )
        changes = map(combine, self._changes, other._changes)
        return Flights(*map(combine, self._sums(), other._sums()), *layers, *changes)

    @property
    def _by_layer(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.attention_by_layer_us, self.ffn_by_layer_us

    @property
    def _changes(self) -> tuple[float, ...]:
        return self.attention_changes_us, self.attention_compared_us, self.ffn_changes_us, self.ffn_compared_us

    def _sums(self) -> tuple[Any, ...]:
        times = self.attention_us, self.ffn_us, self.transfers, self.transfer_us
        return self.count, self.rows, self.context_tokens, *times


@dataclass(frozen=True, slots=True)
class Measured:
    """One attention actor's, from `since_s` to `at_s` (its monotonic clock): since its start, or since an earlier look."""

    since_s: float
    at_s: float
    arrivals: int = 0
    """Requests that came new; those that moved in count nowhere but in tokens, completions and what is running."""
    prompt_tokens: int = 0
    """Computed, again those of requests that start over."""
    output_tokens: int = 0
    """Sent."""
    completions: int = 0
    """Requests that ended, not those that clients gave up or that moved out."""
    late: int = 0
    """Of these, the ones whose first token, or whose tokens on average, came later than their target."""
    preemptions: int = 0
    steps: int = 0
    """Micro-batches that passed all layers."""
    tpot_ms: Histogram = field(default_factory=Histogram)
    """From token to token."""
    ttft_ms: Histogram = field(default_factory=Histogram)
    queue_wait_ms: Histogram = field(default_factory=Histogram)
    """From arrival until the first rows are scheduled."""
    tokens_per_step: Histogram = field(default_factory=Histogram)
    """That a micro-batch sent, where it sent any."""
    running: int = 0
    """At `at_s`, as what follows down to `kv_total`."""
    waiting: int = 0
    oldest_waiting_s: float | None = None
    """How long the request has waited that came first of those that have not begun; None: all have."""
    context_tokens: int = 0
    """Cached tokens of running requests."""
    kv_used: int = 0
    """Blocks."""
    kv_total: int = 0
    flights: Flights = field(default_factory=Flights)
    stages: StagesUs = field(default_factory=dict)

    @property
    def span_s(self) -> float:
        return self.at_s - self.since_s

    def since(self, earlier: "Measured") -> "Measured":
        """What was measured after an earlier look at the same actor."""
        sums = {name: getattr(self, name) - getattr(earlier, name) for name in _SUMS}
        histograms = {name: getattr(self, name).minus(getattr(earlier, name)) for name in _HISTOGRAMS}
        stages = stages_since(self.stages, earlier.stages)
        flights = self.flights.minus(earlier.flights)
        return replace(self, since_s=earlier.at_s, flights=flights, stages=stages, **sums, **histograms)

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        plain = {name: getattr(self, name) for name in ("since_s", "at_s", *_SUMS, *_PRESENT)}
        histograms = {name: getattr(self, name).dump() for name in _HISTOGRAMS}
        return plain | histograms | {"flights": asdict(self.flights), "stages": dump_stages(self.stages)}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> "Measured":
        """What `dump` gave."""
        plain = {name: dumped[name] for name in ("since_s", "at_s", *_SUMS, *_PRESENT)}
        plain |= {name: Histogram.load(dumped[name]) for name in _HISTOGRAMS}
        return cls(**plain, flights=Flights.load(dumped["flights"]), stages=load_stages(dumped["stages"]))


_SUMS = ("arrivals", "prompt_tokens", "output_tokens", "completions", "late", "preemptions", "steps")
_HISTOGRAMS = ("tpot_ms", "ttft_ms", "queue_wait_ms", "tokens_per_step")
_PRESENT = ("running", "waiting", "oldest_waiting_s", "context_tokens", "kv_used", "kv_total")


@dataclass(frozen=True, slots=True)
class MeasuredFFN:
    """One FFN actor's, from `since_s` to `at_s` (its monotonic clock)."""

    since_s: float
    at_s: float
    rows: int = 0
    """Of the waves that passed all layers, those of all attention ranks; one count a wave, not one a layer."""
    steps: int = 0
    """Waves that passed all layers."""
    stages: StagesUs = field(default_factory=dict)

    @property
    def span_s(self) -> float:
        return self.at_s - self.since_s

    def since(self, earlier: "MeasuredFFN") -> "MeasuredFFN":
        """What was measured after an earlier look at the same actor."""
        stages = stages_since(self.stages, earlier.stages)
        return MeasuredFFN(earlier.at_s, self.at_s, self.rows - earlier.rows, self.steps - earlier.steps, stages)

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        plain = {name: getattr(self, name) for name in ("since_s", "at_s", "rows", "steps")}
        return plain | {"stages": dump_stages(self.stages)}

    @classmethod
    def load(cls, dumped: Mapping[str, Any]) -> "MeasuredFFN":
        """What `dump` gave."""
        return cls(**{**dumped, "stages": load_stages(dumped["stages"])})


def bubble(stages: StagesUs) -> float | None:
    """Of the time with work under way, the share in which nothing could be done; None without work."""
    busy_us, wait_us = (sum(stages[name].total for name in names if name in stages) for names in (_BUSY, _WAITS))
    return wait_us / (busy_us + wait_us) if busy_us + wait_us else None


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All of them in one."""
    out = Histogram()
    for histogram in histograms:
        out.merge(histogram)
    return out


def stages_since(later: StagesUs, earlier: StagesUs) -> dict[str, Histogram]:
    """Only those that ran in between."""
    runs = {stage: us.minus(earlier[stage]) if stage in earlier else us for stage, us in later.items()}
    return {stage: us for stage, us in runs.items() if us.count}


def dump_stages(stages: StagesUs) -> dict[str, Any]:
    return {stage: {"count": us.count, "total_us": us.total, "us": us.dump()} for stage, us in stages.items()}


def load_stages(dumped: Mapping[str, Any]) -> dict[str, Histogram]:
    return {stage: Histogram.load(said["us"]) for stage, said in dumped.items()}
