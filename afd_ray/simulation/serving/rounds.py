"""Time that passes while every running sequence decodes one token after the other: in closed form, exact to the picosecond.

A round is one token for each running sequence: M micro-batches, each through all layers. By `pipeline.predicted_period` it lasts
max(M t_a, M t_f, t_a + t_c + t_f), t_a that of the slowest attention rank. While nothing but decoding happens t_f and t_c stay, and each rank's t_a
grows by the same amount every round, so the duration of a round is the greatest of a few straight lines in the round's number. Where the same line
is the greatest in the first and the last round of a run it is so in between, and the run is an arithmetic series; else the run is halved.
"""

from typing import NamedTuple

import numpy as np

from afd_ray.engine.pipeline import predicted_period
from afd_ray.engine.stage_costs import StageTimes

PS_PER_US = 1_000_000
PS_PER_S = 1_000_000_000_000


def picoseconds(us: float) -> int:
    return round(us * PS_PER_US)


class Run(NamedTuple):
    """Rounds that follow each other."""

    rounds: int
    duration_ps: int
    attention_ps: int
    """Of the slowest rank in the first one."""


class Round(NamedTuple):
    """One of them: how long it lasts, the line that says so (a kind, and a rank), and the slowest rank's attention."""

    duration_ps: int
    line: tuple[int, int]
    attention_ps: int


class PassTimes:
    """How long a micro-batch of each attention rank takes through all layers, in picoseconds by the number of the round."""

    def __init__(self, ranks: int) -> None:
        self._at_zero = np.zeros(ranks, dtype=np.int64)
        self._growth = np.zeros(ranks, dtype=np.int64)
        self._transfer = np.zeros(ranks, dtype=np.int64)
        self.micro_batches = 1
        self.ffn_ps = 0

    def set_rank(self, rank: int, number: int, attention_ps: int, growth_ps: int, transfer_ps: int) -> None:
        """From round `number` on: attention lasts so long in it, and so much longer in each later round."""
        self._at_zero[rank] = attention_ps - growth_ps * number
        self._growth[rank] = growth_ps
        self._transfer[rank] = transfer_ps

    def round(self, number: int) -> Round:
        """The one of this number."""
        attention = self._at_zero + self._growth * number
        trips = attention + self._transfer
        slowest, longest = attention.argmax(), trips.argmax()
        slot, micro_batches = int(attention[slowest]), self.micro_batches
        overlapped = int(predicted_period(StageTimes(slot, 0, self.ffn_ps, 0), micro_batches))
        duration = max(overlapped, int(trips[longest]) + self.ffn_ps)
        if duration == micro_batches * self.ffn_ps:
            return Round(duration, (0, 0), slot)
        return Round(duration, (1, int(slowest)) if duration == micro_batches * slot else (2, int(longest)), slot)

    def run(self, number: int, rounds: int) -> int:
        """How long so many rounds from `number` on last together."""
        return self._total(number, rounds, self.round(number), self.round(number + rounds - 1))

    def run_until(self, number: int, most: int, limit_ps: int) -> Run:
        """Rounds from `number` on, as many as begin before `limit_ps` has passed, at most `most` and at least one."""
        first = self.round(number)
        # Rounds never get shorter, so so many at most, and at least as many as if all were as long as the last of those.
        high = min(most, max(1, -(-limit_ps // first.duration_ps)))
        if high == 1:
            return Run(1, first.duration_ps, first.attention_ps)
        last = self.round(number + high - 1)
        low = max(1, min(high, limit_ps // last.duration_ps))
        while low < high:
            middle = (low + high) // 2
            if self._total(number, middle, first, self.round(number + middle - 1)) < limit_ps:
                low = middle + 1
            else:
                high, last = middle, self.round(number + middle - 1)
        return Run(high, self._total(number, high, first, last), first.attention_ps)

    def _total(self, number: int, rounds: int, first: Round, last: Round) -> int:
        if rounds <= 2 or first.line == last.line:
            return (first.duration_ps + last.duration_ps) * rounds // 2
        half = rounds // 2
        ends, goes_on = self.round(number + half - 1), self.round(number + half)
        return self._total(number, half, first, ends) + self._total(number + half, rounds - half, goes_on, last)
