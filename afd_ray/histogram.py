"""Quantiles of a stream in bounded memory."""

import math
from typing import Any

STEP = 1.01
"""Neighbouring buckets differ by one hundredth, and so does what `quantile` gives from the value that was added."""
_LOG_STEP = math.log(STEP)
LEAST = 1e-6
"""What is smaller counts as this."""


class Histogram:
    """Counts positive values in buckets that grow geometrically: 1,400 of them span six decades."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        bucket = round(math.log(value) / _LOG_STEP) if value > LEAST else round(math.log(LEAST) / _LOG_STEP)
        self._counts[bucket] = self._counts.get(bucket, 0) + times
        self.count += times
        self.total += value * times

    def merge(self, other: "Histogram") -> None:
        for bucket, times in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + times
        self.count += other.count
        self.total += other.total

    def minus(self, earlier: "Histogram") -> "Histogram":
        """What was added since: `earlier` is this one as it was before."""
        out = Histogram()
        out._counts = {bucket: new for bucket, times in self._counts.items() if (new := times - earlier._counts.get(bucket, 0))}
        out.count, out.total = self.count - earlier.count, self.total - earlier.total
        return out

    def dump(self) -> dict[str, Any]:
        """As JSON values. May be called while another thread adds."""
        return {"buckets": [[bucket, times] for bucket, times in sorted(self._counts.copy().items())], "total": self.total}

    @classmethod
    def load(cls, dumped: dict[str, Any]) -> "Histogram":
        """What `dump` gave."""
        out = cls()
        out._counts = {int(bucket): int(times) for bucket, times in dumped["buckets"]}
        out.count, out.total = sum(out._counts.values()), float(dumped["total"])
        return out

    def copy(self) -> "Histogram":
        """As it is now. May be called while another thread adds."""
        out = Histogram()
        out._counts, out.total = self._counts.copy(), self.total
        out.count = sum(out._counts.values())
        return out

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def quantiles(self, *shares: float) -> tuple[float, ...] | None:
        """By nearest rank, for shares from 0 to 1 in rising order; None without values."""
        if not self.count:
            return None
        out, seen, buckets = [], 0, iter(sorted(self._counts))
        bucket = next(buckets)
        for share in shares:
            while seen + self._counts[bucket] < share * self.count:
                seen += self._counts[bucket]
                bucket = next(buckets)
            out.append(math.exp(bucket * _LOG_STEP))
        return tuple(out)
