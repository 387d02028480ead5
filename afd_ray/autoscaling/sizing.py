"""How many ranks a load needs: the pipeline's arithmetic turned round.

With M micro-batches in flight a layer of all of them lasts max(M t_a, M t_f, t_a + t_f + t_c) (`pipeline.predicted_period`). Attention's work divides over
the attention ranks: it grows with rows and their context. The FFN's divides over the FFN ranks: each holds its part of the experts' weights and sees every row.
So each of the three bounds gives a least number of ranks in closed form (after the ratio rule of arXiv:2601.21351).
"""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

from afd_ray.autoscaling.values import Counts, Observation
from afd_ray.engine.pipeline import predicted_period
from afd_ray.engine.stage_costs import CostLine, StageCosts

MOST_RANKS = 4096
CONTEXT_SPREAD = 0.7
"""Standard deviation of the cached context of requests that decode, in means: each is somewhere between its first token and its last, and answers differ."""


class Demand(NamedTuple):
    """What has to be served."""

    sequences: float
    """Requests that decode at the same time."""
    context_tokens: float
    """Cached tokens of those, in all."""
    prompt_tokens_s: float = 0.0

    @classmethod
    def of(cls, observation: Observation) -> "Demand":
        """What would run at the target's pace: by Little's law as many requests as that pace needs for the tokens that go out now, or those that are here
        if they are more. A request without a token yet will have as much context as the others."""
        paced = observation.output_tokens_s * observation.goals.tpot_ms / 1000
        sequences = max(observation.requests, paced)
        context = observation.context_tokens / max(observation.running, 1)
        return cls(sequences, context * sequences, observation.prompt_tokens_s)

    def __str__(self) -> str:
        return f"{self.sequences:.0f} requests of {self.context_tokens / max(1, self.sequences):.0f} tokens"

    def times(self, factor: float) -> "Demand":
        return Demand(*(factor * part for part in self))

    def spare(self, deviations: float) -> float:
        """How many times the requests there may soon be by chance: of n that come on their own sqrt(n) more is one standard deviation, a smaller part of many."""
        return 1 + deviations / math.sqrt(max(self.sequences, 1.0))


class Sizing(NamedTuple):
    """What is known of a cluster's stages: costs as measured with `at` ranks, and what corrects them."""

    costs: StageCosts
    at: Counts
    layers: int
    micro_batches: int
    attention_trim: float = 1.0
    """Attention costs so many times what the line says."""
    ffn_trim: float = 1.0

    @classmethod
    def of(cls, observation: Observation, attention_trim: float = 1.0, ffn_trim: float = 1.0) -> "Sizing | None":
        """None before the stages have been measured."""
        costs = observation.costs
        if costs is None or not (any(costs.attention) and any(costs.ffn)):
            return None
        return cls(costs, observation.counts, observation.layers, observation.micro_batches, attention_trim, ffn_trim)

    def tpot_ms(self, counts: Counts, demand: Demand, period_ms: float) -> float:
        """With so many ranks and the best number of micro-batches; prompts add the rows that come in `period_ms`."""
        return min(self._tpot_ms(counts, demand, period_ms, m) for m in range(1, self.micro_batches + 1))

    def needed(self, demand: Demand, tpot_ms: float) -> Counts | None:
        """The fewest ranks that decode a token in `tpot_ms`; None when no number can.

        Different numbers of micro-batches give different splits: of those the one that adds fewest to the present ranks, so that the answer does not
        change sides with the noise.
        """
        options = [self._needed(demand, tpot_ms, m) for m in range(1, self.micro_batches + 1)]
        return min((option for option in options if option is not None), key=self._added, default=None)

    def _added(self, counts: Counts) -> tuple[int, int]:
        return sum(max(0, count - present) for count, present in zip(counts, self.at, strict=True)), sum(counts)

    def _tpot_ms(self, counts: Counts, demand: Demand, period_ms: float, micro_batches: int) -> float:
        rows = demand.sequences + demand.prompt_tokens_s * period_ms / 1000
        costs = self._at(counts)
        mine = rows / counts.attention / micro_batches
        context = demand.context_tokens / counts.attention / micro_batches * fullest(demand.sequences, counts.attention)
        times = costs.times(mine, context)._replace(ffn=costs.ffn.duration_us(rows / micro_batches))
        return self.layers * predicted_period(times, micro_batches) / 1000

    def _needed(self, demand: Demand, tpot_ms: float, micro_batches: int) -> Counts | None:
        layer_us = tpot_ms * 1000 / self.layers
        rows = demand.sequences + demand.prompt_tokens_s * tpot_ms / 1000
        attention, ffn = self._at(Counts(1, 1))[:2]
        room_us = layer_us - micro_batches * attention.base_us
        rows_us, context_us = attention.per_row_us * rows, attention.per_token_us * demand.context_tokens
        ffn_us = micro_batches * ffn.base_us + ffn.per_row_us * rows
        if room_us <= 0:
            return None
        ranks = _at_least_1((rows_us + context_us) / room_us)
        while rows_us + context_us * fullest(demand.sequences, ranks) > ranks * room_us * (1 + 1e-9):
            ranks += 1
        counts = Counts(ranks, _at_least_1(ffn_us / layer_us))
        return self._shorten_round_trip(counts, demand, tpot_ms, micro_batches)

    def _shorten_round_trip(self, counts: Counts, demand: Demand, tpot_ms: float, micro_batches: int) -> Counts | None:
        """Adds a rank where it shortens the way through attention, wire and FFN most, until that fits; None when it never does."""
        reached = self._tpot_ms(counts, demand, tpot_ms, micro_batches)
        while reached > tpot_ms:
            more = [counts._replace(attention=counts.attention + 1), counts._replace(ffn=counts.ffn + 1)]
            counts = min(more, key=lambda option: self._tpot_ms(option, demand, tpot_ms, micro_batches))
            before, reached = reached, self._tpot_ms(counts, demand, tpot_ms, micro_batches)
            if reached > before * (1 - 1e-4) or sum(counts) > MOST_RANKS:
                return None
        return counts

    def _at(self, counts: Counts) -> StageCosts:
        """The lines with another number of FFN ranks: each then holds another part of the weights, and does another part of each row's work."""
        share = self.at.ffn / counts.ffn
        attention = CostLine(*(self.attention_trim * part for part in self.costs.attention))
        return StageCosts(attention, CostLine(*(self.ffn_trim * share * part for part in self.costs.ffn)), self.costs.transfer)


def fullest(sequences: float, ranks: int) -> float:
    """How many times the mean context the attention rank with most of it has, which the others wait for: requests are dealt evenly, but not their contexts.

    A rank's context is a sum of sequences / ranks contexts; the largest of so many sums is expected where the normal distribution has it (Blom 1958).
    """
    return 1 + CONTEXT_SPREAD * _largest_deviate(ranks) / math.sqrt(max(1.0, sequences / ranks))


@lru_cache(maxsize=MOST_RANKS)
def _largest_deviate(draws: int) -> float:
    """Of so many draws from the standard normal distribution, expected."""
    return NormalDist().inv_cdf((draws - 0.375) / (draws + 0.25)) if draws > 1 else 0.0


def least_for_kv(observation: Observation, most_used: float) -> int:
    """Attention ranks whose KV caches hold what the present ones do, filled to `most_used` at most."""
    return _at_least_1(observation.counts.attention * observation.kv_used / most_used)


def _at_least_1(ranks: float) -> int:
    return max(1, math.ceil(ranks - 1e-9))
