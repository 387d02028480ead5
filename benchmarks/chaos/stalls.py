"""How long a fault kept clients waiting."""

import itertools
from collections.abc import Iterable, Sequence
from statistics import quantiles


def stall_s(times_s: Sequence[float], struck_s: float, repaired_s: float) -> float | None:
    """From the fault to the end of the longest wait for a token after it, of the waits that had begun by the repair.

    `times_s`: when the answer was asked for and when each token came. Tokens that were on their way still come just after the fault: the first
    one tells nothing. None for an answer that was over.
    """
    pairs = itertools.pairwise(times_s)
    gaps = [(after - max(before, struck_s), after) for before, after in pairs if after > struck_s and before < repaired_s]
    return max(gaps)[1] - struck_s if gaps else None


def spread(values: Iterable[float]) -> dict[str, float]:
    """p50, p95 and the largest; empty for no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    cuts = quantiles(ordered, n=20, method="inclusive") if len(ordered) > 1 else ordered * 19
    return {"p50": round(cuts[9], 3), "p95": round(cuts[18], 3), "max": round(ordered[-1], 3)}
