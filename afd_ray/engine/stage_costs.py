"""What a stage costs by its rows and their context, learned from the stages that were run."""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GAIN = 0.2
"""Weight of a new sample in the mean of its row count."""
PRIOR = 0.05
"""Weight of the belief that so much of a stage is its base (`CostMeter`), beside samples of weight 1."""
SAMPLES_A_FIT = 8
MOST_SLACK = 0.1
"""A round trip tells of the transfer when at most this share of it may have been waiting for a busy actor."""
MOST_HIDDEN = 0.5
"""The same of a round trip that counts in the mean. Where hardly any waits for less than a tenth, those that do are the slow ones, which something else held up."""


class StageTimes(NamedTuple):
    """How long one micro-batch spends in each stage of a layer."""

    attention: float
    a2f: float
    ffn: float
    f2a: float


class CostLine(NamedTuple):
    """Microseconds of one layer of a micro-batch."""

    base_us: float = 0.0
    per_row_us: float = 0.0
    per_token_us: float = 0.0
    """Of cached context."""

    def duration_us(self, rows: float, context_tokens: float = 0) -> float:
        return self.base_us + self.per_row_us * rows + self.per_token_us * context_tokens


class StageCosts(NamedTuple):
    """The lines of one attention rank's layer, as it sees them."""

    attention: CostLine
    ffn: CostLine
    transfer: CostLine
    """Both ways together."""

    @property
    def row(self) -> CostLine:
        """Attention and FFN together: what a row takes on its way through a layer."""
        return CostLine(*(sum(pair) for pair in zip(self.attention, self.ffn, strict=True)))

    def times(self, rows: float, context_tokens: float) -> StageTimes:
        one_way = self.transfer.duration_us(rows) / 2
        return StageTimes(self.attention.duration_us(rows, context_tokens), one_way, self.ffn.duration_us(rows), one_way)


class CostMeter:
    """Learns a CostLine.

    It keeps an exponentially weighted mean for each power of two of rows, and draws the line through those means, the nearer to the
    last sample the heavier. So base and slope stay known while one row count alone is run.
    """

    def __init__(self, samples_a_fit: int = SAMPLES_A_FIT, base_share: float = 0.5) -> None:
        """The line is drawn anew after so many samples. `base_share`: of what samples do not tell apart, so much is taken for the base, and the rest
        for rows and context alike."""
        self._samples_a_fit, self._base_share = samples_a_fit, base_share
        self._means: dict[int, np.ndarray] = {}  # rows.bit_length(): rows, context tokens, microseconds
        self._counts: dict[int, int] = {}
        self._last = 0
        self._line = CostLine()
        self._unfitted = 0

    def add(self, rows: int, context_tokens: int, duration_us: float) -> None:
        """A stage of so many rows over so many cached tokens took so long."""
        size = self._last = rows.bit_length()
        sample = np.array((rows, context_tokens, max(duration_us, 1e-3)))
        count = self._counts[size] = self._counts.get(size, 0) + 1
        mean = self._means.setdefault(size, sample)
        self._means[size] = mean + (sample - mean) * max(GAIN, 1 / count)
        self._unfitted += 1

    @property
    def line(self) -> CostLine:
        """What the samples say; zeros without any."""
        if self._unfitted >= min(self._samples_a_fit, sum(self._counts.values())) > 0:
            self._line = self._fit()
            self._unfitted = 0
        return self._line

    def _fit(self) -> CostLine:
        means = np.stack(list(self._means.values()))
        inputs = np.column_stack((np.ones(len(means)), means[:, :2]))
        us = means[:, 2]
        near = np.array([2.0 ** -abs(size - self._last) for size in self._means])
        scale = inputs[list(self._means).index(self._last)] / self._means[self._last][2]
        # Relative errors, so that large micro-batches do not outweigh small ones.
        weights = near / us
        others = 1 - self._base_share
        believed = np.where(scale > 0, (self._base_share, others, others), 0.0)
        believed[1:] /= max(1, np.count_nonzero(scale[1:]))
        design = np.concatenate((inputs * weights[:, None], PRIOR * np.diag(scale)))
        target = np.concatenate((near, PRIOR * believed))
        return CostLine(*_least_squares(design, target))


def _least_squares(design: np.ndarray, target: np.ndarray) -> list[float]:
    """Coefficients of the least squared error, none negative: the most negative is taken out until there is none."""
    kept = list(range(design.shape[1]))
    out = [0.0] * design.shape[1]
    while kept:
        solved = np.linalg.lstsq(design[:, kept], target, rcond=None)[0]
        if solved.min() >= 0:
            for index, value in zip(kept, solved, strict=True):
                out[index] = float(value)
            break
        del kept[int(solved.argmin())]
    return out


def transfer_us(round_trip_us: float, busy_us: float, unseen_us: float) -> float | None:
    """Both ways' transfer from dispatch to return; None when `unseen_us`, how long the rows may have lain unseen at either end, hides it.

    `round_trip_us` is without the time that they are known to have waited there.
    """
    if unseen_us > MOST_SLACK * round_trip_us:
        return None
    return max(0.0, round_trip_us - busy_us - unseen_us)


def mean_transfer_us(round_trip_us: float, busy_us: float, unseen_us: float) -> float | None:
    """The same of as many round trips as can be, for a mean that is not one of the slow ones: the rows lay unseen for half of `unseen_us`, on average."""
    if unseen_us > MOST_HIDDEN * round_trip_us:
        return None
    return max(0.0, round_trip_us - busy_us - unseen_us / 2)


class FlightTimes:
    """What one micro-batch took on its way through the layers, in microseconds."""

    def __init__(self) -> None:
        self.attention_by_layer: list[float] = []
        """Layer after layer, and then the head."""
        self.ffn_by_layer: list[float] = []
        self.transfer = 0.0
        self.transfers = 0
        self.carried = 0.0
        """The sum of `mean_transfer_us` over `carries` layers."""
        self.carries = 0
        self.transfer_at_most = math.inf
        """One layer's transfer took no longer; no part of the sums."""

    @property
    def attention(self) -> float:
        return sum(self.attention_by_layer)

    @property
    def ffn(self) -> float:
        return sum(self.ffn_by_layer)

    def changes(self, before: "FlightTimes") -> tuple[float, float, float, float]:
        """How far the attention layers are from those of another micro-batch, and the sum of both; the same of the FFN's."""
        attention = _changes(self.attention_by_layer, before.attention_by_layer)
        return *attention, *_changes(self.ffn_by_layer, before.ffn_by_layer)

    def attended(self, duration_us: float) -> None:
        """The attention rank worked on its next layer, or on the head."""
        self.attention_by_layer.append(duration_us)

    def fed(self, duration_us: float) -> None:
        """An FFN worked on its next layer."""
        self.ffn_by_layer.append(duration_us)

    def returned(self, round_trip_us: float, busy_us: float, unseen_us: float) -> None:
        """A layer came back from the FFN (`transfer_us`), which worked on it for `busy_us`."""
        self.fed(busy_us)
        transfer, carried = transfer_us(round_trip_us, busy_us, unseen_us), mean_transfer_us(round_trip_us, busy_us, unseen_us)
        if transfer is not None:
            self.transfer += transfer
            self.transfers += 1
        if carried is not None:
            self.carried += carried
            self.carries += 1

    def crossed(self, duration_us: float) -> None:
        """A layer's rows were on their way so long, there and back, and waited for nobody."""
        self.transfer += duration_us
        self.carried += duration_us
        self.transfers += 1
        self.carries += 1

    def crossed_within(self, duration_us: float) -> None:
        """As `crossed`, but they may have waited for other ranks' rows meanwhile."""
        self.transfer_at_most = min(self.transfer_at_most, duration_us)


def _changes(now: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    return sum(map(abs, map(operator.sub, now, before))), sum(now) + sum(before)


class StageMeter:
    """Learns the StageCosts of one attention rank."""

    def __init__(self) -> None:
        self.attention, self.ffn, self.transfer = CostMeter(), CostMeter(), CostMeter()

    def add(self, times: FlightTimes, rows: int, context_tokens: int, layers: int) -> None:
        """A micro-batch has passed all layers; embedding, head and sampling count as part of them.

        Where a transfer is only known to take no longer than so, it is taken to take so long: then neither half waits for want of micro-batches.
        """
        self.add_attention(times, rows, context_tokens, layers)
        self.ffn.add(rows, 0, times.ffn / layers)
        if times.transfers:
            self.transfer.add(rows, 0, times.transfer / times.transfers)
        elif times.transfer_at_most < math.inf:
            self.transfer.add(rows, 0, times.transfer_at_most)

    def add_attention(self, times: FlightTimes, rows: int, context_tokens: int, layers: int) -> None:
        """The same of one of whose FFN nothing is known."""
        self.attention.add(rows, context_tokens, times.attention / layers)

    def forget_ffn(self) -> None:
        """Other FFN ranks, or another number of them: what was learned of theirs and of the way there holds no longer."""
        self.ffn, self.transfer = CostMeter(), CostMeter()

    @property
    def costs(self) -> StageCosts:
        return StageCosts(self.attention.line, self.ffn.line, self.transfer.line)
