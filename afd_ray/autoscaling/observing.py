"""From what the actors of a live cluster measured to what a policy is shown of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

from afd_ray.autoscaling.learning import StageBook
from afd_ray.autoscaling.values import Observation, Quantiles, Stages
from afd_ray.histogram import Histogram
from afd_ray.measured import Flights, Measured, MeasuredFFN, merged

M = TypeVar("M", Measured, MeasuredFFN)


@dataclass(frozen=True, slots=True)
class Look:
    """What the members of an epoch answered."""

    epoch: int
    attention: Mapping[str, Measured]
    """By id, since each of them started."""
    ffn: Mapping[str, MeasuredFFN]
    recent: Sequence[Measured]
    """Of the attention members, over the last minute."""
    slots: int = 1
    """Micro-batches that an attention rank has in flight now."""


class Observer:
    """Looks at one cluster again and again; what happened is the difference between two looks.

    A member that is there for the first time tells of the present, and of what happened from then on.
    """

    def __init__(self) -> None:
        self._book = StageBook()
        self._before: Look | None = None

    def observe(self, known: Observation, look: Look) -> Observation:
        """`known`, with everything that only the members can tell."""
        before, self._before = self._before or look, look
        spans, ffn_spans = _since(look.attention, before.attention), _since(look.ffn, before.ffn)
        if before.epoch == look.epoch:
            self._learn([span.flights for span in spans], known.counts.ffn)
        members = look.attention.values()
        return replace(
            known,
            running=sum(member.running for member in members),
            waiting=sum(member.waiting for member in members),
            context_tokens=sum(member.context_tokens for member in members),
            kv_used=max((member.kv_used / member.kv_total for member in members if member.kv_total), default=0.0),
            arrivals_s=sum(span.arrivals / span.span_s for span in spans),
            prompt_tokens_s=sum(span.prompt_tokens / span.span_s for span in spans),
            output_tokens_s=sum(span.output_tokens / span.span_s for span in spans),
            completions_s=sum(span.completions / span.span_s for span in spans),
            late_s=sum(span.late / span.span_s for span in spans),
            queue_wait_s=max((m.oldest_waiting_s for m in members if m.oldest_waiting_s is not None), default=None),
            tpot_mean_ms=merged(span.tpot_ms for span in spans).mean,
            tpot_ms=quantiles_of(recent.tpot_ms for recent in look.recent),
            ttft_ms=quantiles_of(recent.ttft_ms for recent in look.recent),
            stages=stages_of(spans, ffn_spans, known.layers, look.slots),
            costs=self._book.costs(known.counts.ffn),
        )

    def _learn(self, flights: Sequence[Flights], ffn_ranks: int) -> None:
        """One mean micro-batch of each attention rank, and one mean wave."""
        for own in flights:
            if own.count:
                self._book.attended(own.rows / own.count, own.context_tokens / own.count, own.attention_us / own.count)
            if own.transfers:
                self._book.carried(own.rows / own.count, own.transfer_us / own.transfers)
        waves, every = waves_of(flights), reduce(Flights.plus, flights, Flights())
        if waves:
            self._book.fed(every.rows / waves, ffn_ranks, every.ffn_us / every.count)


def quantiles_of(histograms: Iterable[Histogram]) -> Quantiles | None:
    """Of all of them together; None without values."""
    values = merged(histograms).quantiles(0.50, 0.95, 0.99)
    return Quantiles(*values) if values else None


def stages_of(attention: Sequence[Measured], ffn: Sequence[MeasuredFFN], layers: int, slots: int) -> Stages | None:
    """Means over the micro-batches of a span; None where none passed all layers. `slots`: micro-batches of a rank in flight."""
    flights = [span.flights for span in attention]
    every, rounds = reduce(Flights.plus, flights, Flights()), waves_of(flights) * layers / slots
    if not rounds:
        return None
    return Stages(
        attention=max(own.attention_us / own.count for own in flights if own.count),
        ffn=every.ffn_us / every.count,
        transfer=every.transfer_us / every.transfers if every.transfers else 0.0,
        attention_wait=_waited_us(attention, "attention_wait") / rounds,
        ffn_wait=_waited_us(ffn, "ffn_wait") / rounds,
    )


def waves_of(flights: Iterable[Flights]) -> int:
    """An attention rank has a micro-batch in a wave, or none."""
    return max((own.count for own in flights), default=0)


def _waited_us(spans: Sequence[Measured] | Sequence[MeasuredFFN], stage: str) -> float:
    """Of a rank, on average."""
    return sum(span.stages[stage].total for span in spans if stage in span.stages) / max(1, len(spans))


def _since(now: Mapping[str, M], before: Mapping[str, M]) -> list[M]:
    """Of the members that were there before, over the time since."""
    spans = [measured.since(before[member]) for member, measured in now.items() if member in before]
    return [span for span in spans if span.span_s > 0]
