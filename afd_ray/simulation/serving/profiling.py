"""From what a live cluster measured under loads of known shape to the stage times that `stages.Profile` reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from afd_ray.measured import Flights, Measured

ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Decoding sequences of each attention rank."""
SHORT_PROMPT = 8
CONTEXT_TOKENS = 8192
"""Of a rank's sequences together, at most, where contexts are long."""
CHUNKS = (32, 128, 512)
"""Prompt rows of a micro-batch."""
LEAST_FLIGHTS = 4
"""What fewer micro-batches say is left out."""


class Trial(NamedTuple):
    """Requests alike, all at once. One token each: only their prompts are measured, else only steps in which all of them decode."""

    requests: int
    prompt: int
    output: int

    @property
    def of_prompts(self) -> bool:
        return self.output == 1


class Look(NamedTuple):
    """All attention ranks of a cluster at one moment, since their start."""

    epoch: int
    ranks: Mapping[str, Measured]

    @property
    def running(self) -> int:
        return sum(rank.running for rank in self.ranks.values())

    @property
    def completions(self) -> int:
        return sum(rank.completions for rank in self.ranks.values())

    @property
    def prompt_tokens(self) -> int:
        return sum(rank.prompt_tokens for rank in self.ranks.values())


@dataclass(frozen=True, slots=True)
class Facts:
    """What bounds the loads that a cluster can be given, and what its rows are on the wire."""

    attention: int
    ffn: int
    layers: int
    token_budget: int
    """Rows of a micro-batch."""
    max_running: int
    """Requests of an attention rank."""
    context_limit: int
    kv_tokens: int
    """Of an attention rank."""
    vocab_size: int
    bytes_per_row: int
    """Both ways."""


def trials(facts: Facts, steps: int) -> Iterator[Trial]:
    """From few rows to many, each with short and with long contexts, `steps` tokens each; then prompts alone."""
    room = facts.context_limit - steps
    for rows in (rows for rows in ROWS if rows <= min(facts.max_running, facts.token_budget)):
        each = min(room, min(CONTEXT_TOKENS, facts.kv_tokens // 2) // rows)
        for prompt in sorted({min(SHORT_PROMPT, each), each}):
            if prompt > 0 and (prompt + steps) * rows <= facts.kv_tokens:
                yield Trial(rows * facts.attention, prompt, steps)
    for rows in CHUNKS:
        if rows <= min(facts.token_budget, facts.context_limit - 1, facts.kv_tokens - 1):
            yield Trial(facts.attention, rows, 1)


def span_of(trial: Trial, looks: Sequence[Look]) -> list[Flights]:
    """What each rank computed in the part of a trial that is to be measured; empty where the looks do not show it."""
    if trial.of_prompts:
        chosen = list(looks)
    else:
        all_run = [look for look in looks if look.running == trial.requests]
        prompts = all_run[-1].prompt_tokens if all_run else 0
        ended = all_run[0].completions if all_run else 0
        chosen = [look for look in all_run if look.prompt_tokens == prompts and look.completions == ended]
    if len(chosen) < 2 or chosen[0].epoch != chosen[-1].epoch:
        return []
    first, last = chosen[0].ranks, chosen[-1].ranks
    spans = [last[name].flights.minus(first[name].flights) for name in last if name in first]
    return [span for span in spans if span.count >= (1 if trial.of_prompts else LEAST_FLIGHTS)]


class Points:
    """The measured points of a profile, as they come."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._attention: list[dict[str, float]] = []
        self._ffn: list[dict[str, float]] = []
        self._transfer: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self._attention)

    def add(self, spans: Iterable[Flights]) -> None:
        """One trial's, by attention rank: each rank's mean micro-batch, and the mean wave of all of them."""
        spans = list(spans)
        for own in spans:
            rows, context = round(own.rows / own.count, 1), round(own.context_tokens / own.count)
            self._attention.append({"rows": rows, "context_tokens": context, "us": round(own.attention_us / own.count, 2)})
            if own.transfers:
                size, us = round(rows * self._facts.bytes_per_row), round(own.transfer_us / own.transfers, 2)
                self._transfer.append({"bytes": size, "us": us})
        if spans:
            every, waves = reduce(Flights.plus, spans), max(own.count for own in spans)
            rows, us = round(every.rows / waves, 1), round(every.ffn_us / every.count, 2)
            self._ffn.append({"rows": rows, "us": us, "ranks": self._facts.ffn})

    def dump(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The file, as JSON values; `about` goes in front."""
        return {
            "about": dict(about),
            "layers": self._facts.layers,
            "bytes_per_row": self._facts.bytes_per_row,
            "attention": self._attention,
            "ffn": self._ffn,
            "transfer": self._transfer,
        }
