"""Whether a request that comes from another attention actor brings its keys and values, or has them computed again."""

from typing import NamedTuple

from afd_ray.engine.stage_costs import CostLine, StageCosts


class Prospect(NamedTuple):
    """What either way is expected to take, with what is ahead of it, seconds."""

    fetch_s: float
    recompute_s: float | None
    """None: not known, no stage has been run yet."""

    @property
    def fetches(self) -> bool:
        """Whether to fetch. Where nothing is known of computing, copying is the safer guess."""
        return self.recompute_s is None or self.fetch_s < self.recompute_s


def recompute_s(costs: StageCosts, layers: int, rows: int, rows_at_once: int) -> float | None:
    """Seconds that the first `rows` positions of a request take through all layers, in chunks one after the other.

    None while no stage of an attention rank has been measured.
    """
    if costs.attention == CostLine():
        return None
    chunks = ((first, min(rows_at_once, rows - first)) for first in range(0, rows, rows_at_once))
    return layers * sum(sum(costs.times(count, first + count)) for first, count in chunks) / 1e6
