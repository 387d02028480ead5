"""How the running sequences are dealt to the slots, so that micro-batches last equally long though contexts differ."""

from collections.abc import Iterable
from collections.abc import Sequence as Many

from afd_ray.engine.sequence import MicroBatch, Sequence
from afd_ray.engine.stage_costs import CostLine

ROWS_ALONE = CostLine(per_row_us=1.0)
MOST_STRETCH = 4.0
"""Prompts that join decoding rows may stretch a micro-batch to so many times what a fair share of those rows takes."""
LEAST_PREFILL = 8
"""Part of the token budget that prompts get in any case, 1 in so many."""
ROUNDING = 1e-6
"""A row that fits but for so small a part of it fits."""


class Share:
    """One slot's part of the decode rows, by predicted time, while it is dealt out."""

    def __init__(self, running: Iterable[Sequence], others: Many[MicroBatch | None], costs: CostLine) -> None:
        """Of the `running` sequences; `others` is what each other slot in use has in flight."""
        self.costs = costs
        self._taken_us = 0.0
        self._fair_us = sum(self.row_us(sequence) for sequence in running if sequence.decodes) / (len(others) + 1)
        self._room_us = [self._fair_us - self._held_us(batch) for batch in others]

    def row_us(self, sequence: Sequence) -> float:
        """The next row of a decoding sequence."""
        return self.costs.per_row_us + self.costs.per_token_us * sequence.computed

    def wants(self, sequence: Sequence) -> bool:
        """Whether its row brings the slot nearer to its part; if not it is another slot's, but wanted all the same if it fits none."""
        row_us = self.row_us(sequence)
        if self._taken_us + row_us / 2 <= self._fair_us or not self._room_us:
            return True
        roomiest = max(range(len(self._room_us)), key=self._room_us.__getitem__)
        if self._room_us[roomiest] < row_us * (1 - ROUNDING):
            return True
        self._room_us[roomiest] -= row_us
        return False

    def take(self, sequence: Sequence) -> None:
        """Its row is in the slot's micro-batch."""
        self._taken_us += self.row_us(sequence)

    def prefill_rows(self) -> int | None:
        """Prompt rows beside the decode rows taken that keep the micro-batch within MOST_STRETCH; None: as many as there are."""
        return prefill_room(self.costs, self._fair_us, self._taken_us)

    def _held_us(self, batch: MicroBatch | None) -> float:
        return sum(self.row_us(chunk.sequence) for chunk in batch.chunks if chunk.sequence.decodes) if batch else 0.0


def prefill_room(costs: CostLine, fair_us: float, taken_us: float) -> int | None:
    """Prompt rows that may join decode rows of `taken_us`, where a fair share of those lasts `fair_us`; None: as many as there are."""
    if fair_us == 0 or costs.per_row_us == 0:
        return None
    allowed_us = MOST_STRETCH * (costs.base_us + fair_us) - costs.base_us - taken_us
    return max(0, int(allowed_us / costs.per_row_us))
