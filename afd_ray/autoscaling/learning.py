"""What a cluster's stages cost, learned from samples over its whole life, whatever its counts were."""

from afd_ray.engine.stage_costs import CostLine, CostMeter, StageCosts

BASE_SHARE = 0.8
"""A cluster that is new to its load has not shown what more rows cost. Whoever takes them for dear grows at the first requests; what they do cost shows as soon as they come."""


class StageBook:
    """Microseconds of a layer of a micro-batch. FFN ranks share the work of a layer, so that what one number of ranks taught holds for another."""

    def __init__(self) -> None:
        # A live cluster gives one sample of each rank in a control period: each of them counts.
        self._attention, self._ffn, self._transfer = (CostMeter(samples_a_fit=1, base_share=BASE_SHARE) for _ in range(3))

    def attended(self, rows: float, context_tokens: float, duration_us: float) -> None:
        """One attention rank's micro-batch."""
        self._attention.add(max(1, round(rows)), round(context_tokens), duration_us)

    def fed(self, rows: float, ranks: int, duration_us: float) -> None:
        """The rows of all attention ranks in the FFN of so many ranks."""
        self._ffn.add(max(1, round(rows)), 0, duration_us * ranks)

    def carried(self, rows: float, duration_us: float) -> None:
        """One attention rank's rows on the wire, both ways."""
        self._transfer.add(max(1, round(rows)), 0, duration_us)

    def costs(self, ranks: int) -> StageCosts:
        """With so many FFN ranks: attention and transfer by one attention rank's rows, the FFN by the rows of all."""
        work = self._ffn.line
        return StageCosts(self._attention.line, CostLine(*(part / max(1, ranks) for part in work)), self._transfer.line)
