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
CHUNK_ALONE = 128
"""Of the only rank that has work."""
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
    """From few rows to many, each with short and with long contexts, `steps` tokens each; then prompts alone; then a single request, for one rank alone."""
    room = facts.context_limit - steps
    for rows in (rows for rows in ROWS if rows <= min(facts.max_running, facts.token_budget)):
        each = min(room, min(CONTEXT_TOKENS, facts.kv_tokens // 2) // rows)
        for prompt in sorted({min(SHORT_PROMPT, each), each}):
            if prompt > 0 and (prompt + steps) * rows <= facts.kv_tokens:
                yield Trial(rows * facts.attention, prompt, steps)
    most = min(facts.token_budget, facts.context_limit - 1, facts.kv_tokens - 1)
    for rows in CHUNKS:
        if rows <= most:
            yield Trial(facts.attention, rows, 1)
    if facts.attention > 1:
        for prompt in sorted({min(SHORT_PROMPT, room), min(room, CONTEXT_TOKENS, facts.kv_tokens // 2)}):
            if prompt > 0 and prompt + steps <= facts.kv_tokens:
                yield Trial(1, prompt, steps)
        if most >= CHUNK_ALONE:
            yield Trial(1, CHUNK_ALONE, 1)


def span_of(trial: Trial, looks: Sequence[Look]) -> list[Flights]:
    """What each rank computed in the part of a trial that is to be measured, in one epoch; empty where the looks do not show it."""
    if trial.of_prompts:
        chosen = list(looks)
    else:
        all_run = [look for look in looks if look.running == trial.requests]
        prompts = all_run[-1].prompt_tokens if all_run else 0
        ended = all_run[0].completions if all_run else 0
        chosen = [look for look in all_run if look.prompt_tokens == prompts and look.completions == ended]
    if len(chosen) < 2:
        return []
    first, last = chosen[0].ranks, chosen[-1].ranks
    spans = [last[name].flights.minus(first[name].flights) for name in last if name in first]
    return [span for span in spans if span.count >= (1 if trial.of_prompts else LEAST_FLIGHTS)]


def shares(by_layer_us: Sequence[float], mean_us: float) -> list[float]:
    """Each as a share of the mean."""
    return [round(us / mean_us, 3) for us in by_layer_us] if mean_us else []


def spread_of(compared_us: float, spread: float) -> dict[str, float]:
    """Empty where no micro-batch could be compared with the one before."""
    return {"spread": round(spread, 3)} if compared_us else {}


class Points:
    """The measured points of a profile, as they come."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._taken: dict[Trial, list[Trio]] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def add(self, trial: Trial, spans: Iterable[Flights]) -> None:
        """One trial's, by attention rank: each rank's mean micro-batch, and the mean wave of all of them. One that is repeated counts by the repetition in the middle.

        Transfers count where a rank has one micro-batch in flight: with more, those alone that were slow can be told from waiting.
        """
        spans, facts = list(spans), self._facts
        attention, transfer = [], []
        for own in spans:
            rows, context = round(own.rows / own.count, 1), round(own.context_tokens / own.count)
            us, layers = round(own.attention_us / own.count, 2), shares(own.attention_by_layer_us, own.attention_us)
            spread = spread_of(own.attention_compared_us, own.attention_spread)
            attention.append({"rows": rows, "context_tokens": context, "us": us, "by_layer": layers} | spread)
            if own.transfers and trial.requests <= facts.attention:
                transfer.append({"bytes": round(rows * facts.bytes_per_row), "us": round(own.transfer_us / own.transfers, 2)})
        if spans:
            every, waves = reduce(Flights.plus, spans), max(own.count for own in spans)
            rows, us = round(every.rows / waves, 1), round(every.ffn_us / every.count, 2)
            layers, spread = shares(every.ffn_by_layer_us, every.ffn_us), spread_of(every.ffn_compared_us, every.ffn_spread)
            ffn = {"rows": rows, "us": us, "ranks": facts.ffn, "by_layer": layers} | spread
            self._taken.setdefault(trial, []).append(Trio(attention, [ffn], transfer))

    def dump(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The file, as JSON values; `about` goes in front."""
        facts = self._facts
        alone = [takes for trial, takes in self._taken.items() if trial.requests < facts.attention]
        together = [takes for trial, takes in self._taken.items() if trial.requests >= facts.attention]
        return {
            "about": dict(about),
            "layers": facts.layers,
            "bytes_per_row": facts.bytes_per_row,
            **_merged(together),
            "alone": {"ranks": facts.attention, **_merged(alone)},
        }


class Trio(NamedTuple):
    """The points of one trial, as they stand in the file."""

    attention: list[dict[str, Any]]
    ffn: list[dict[str, Any]]
    transfer: list[dict[str, Any]]


def _merged(trials_: Iterable[Sequence[Trio]]) -> dict[str, list[dict[str, Any]]]:
    """Of each trial's repetitions the one in the middle, for each kind of points apart."""
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in Trio._fields}
    for takes in trials_:
        for name, points in out.items():
            ordered = sorted((getattr(take, name) for take in takes), key=lambda taken: sum(point["us"] for point in taken))
            points += ordered[len(ordered) // 2]
    return out
