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

    def attention_ps(self, number: int) -> int:
        """Of the slowest rank."""
        return int((self._at_zero + self._growth * number).max())

    def duration_ps(self, number: int) -> int:
        """Of one round."""
        return self._greatest(number)[0]

    def run(self, number: int, rounds: int) -> int:
        """How long so many rounds from `number` on last together."""
        if rounds <= 0:
            return 0
        first, line = self._greatest(number)
        if rounds == 1:
            return first
        last, last_line = self._greatest(number + rounds - 1)
        if line == last_line or rounds == 2:
            return (first + last) * rounds // 2 if rounds > 2 else first + last
        half = rounds // 2
        return self.run(number, half) + self.run(number + half, rounds - half)

    def run_until(self, number: int, most: int, limit_ps: int) -> Run:
        """Rounds from `number` on, as many as begin before `limit_ps` has passed, at most `most` and at least one."""
        first = self.duration_ps(number)
        if most == 1 or first >= limit_ps:
            return Run(1, first)
        # Rounds never get shorter, so so many at most, and at least as many as if all were as long as the last of those.
        high = min(most, -(-limit_ps // first))
        low = max(1, min(high, limit_ps // self.duration_ps(number + high - 1)))
        while low < high:
            middle = (low + high) // 2
            if self.run(number, middle) < limit_ps:
                low = middle + 1
            else:
                high = middle
        return Run(low, self.run(number, low))

    def _greatest(self, number: int) -> tuple[int, tuple[int, int]]:
        """The duration of a round, and which line it lies on: (kind, rank)."""
        attention = self._at_zero + self._growth * number
        trips = attention + self._transfer
        slowest, longest = int(attention.argmax()), int(trips.argmax())
        slot = int(attention[slowest])
        times = StageTimes(slot, 0, self.ffn_ps, 0)
        trip = int(trips[longest]) + self.ffn_ps
        duration = max(int(predicted_period(times, self.micro_batches)), trip)
        if duration == self.micro_batches * self.ffn_ps:
            return duration, (0, 0)
        return duration, (1, slowest) if duration == self.micro_batches * slot else (2, longest)
