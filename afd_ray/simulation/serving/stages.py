"""How long simulated stages last: from lines (paced actors), from a cost model, or from a profile of a live cluster."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from afd_ray.config import Pace
from afd_ray.engine.stage_costs import CostLine

Scaling = Literal["shared", "routed", "none"]


class Shape(NamedTuple):
    """What the FFN's work is divided over."""

    instances: int
    tensor_parallel: int = 1

    @property
    def ranks(self) -> int:
        return self.instances * self.tensor_parallel


class StageModel(Protocol):
    """Microseconds of one layer of one micro-batch."""

    def attention_us(self, rows: float) -> tuple[float, float]:
        """For so many rows: what it takes without context, and what each cached token adds."""
        ...

    def ffn_us(self, rows: float, shape: Shape) -> float:
        """For the rows of all attention ranks together."""
        ...

    def transfer_us(self, rows: float) -> float:
        """Both ways, for one attention rank's rows."""
        ...


class LinearStages(NamedTuple):
    """Straight lines, as paced actors follow them."""

    attention: CostLine
    ffn: CostLine
    """Of an FFN rank; what becomes of it with other numbers of ranks says `scaling`."""
    transfer: CostLine = CostLine()
    scaling: Scaling = "shared"
    """shared: the line is of one rank alone, and ranks divide its work. routed: an instance computes the rows with an expert of its own, as paced actors do with
    `ffn.dispatch: routed`. none: every rank takes as long as one would, as paced actors do with `broadcast`."""
    experts: int = 48
    chosen: int = 3
    """Experts of each row."""

    def attention_us(self, rows: float) -> tuple[float, float]:
        return self.attention.duration_us(rows), self.attention.per_token_us

    def ffn_us(self, rows: float, shape: Shape) -> float:
        if self.scaling == "shared":
            return self.ffn.duration_us(rows) / shape.ranks
        if self.scaling == "routed":
            return self.ffn.duration_us(rows * share_of_rows(shape.instances, self.experts, self.chosen))
        return self.ffn.duration_us(rows)

    def transfer_us(self, rows: float) -> float:
        return self.transfer.duration_us(rows)


def share_of_rows(instances: int, experts: int, chosen: int) -> float:
    """Of rows that choose experts evenly, how many have one in a given instance: 1 - C(E - E/N, k) / C(E, k)."""
    elsewhere = experts - experts // instances
    return 1 - math.comb(elsewhere, chosen) / math.comb(experts, chosen)


class Profile:
    """Measured stage times, between the measured points by straight lines, beyond them by the nearest one.

    The file (`read`) is JSON: {"attention": [{"rows", "context_tokens", "us"}, ...], "ffn": [{"rows", "us", "ranks"}, ...],
    "transfer": [{"bytes", "us"}, ...], "bytes_per_row"}; microseconds of one layer of one micro-batch, `context_tokens` of all its rows together,
    `ranks` the FFN ranks that were there (default 1), transfers both ways.
    """

    def __init__(
        self,
        attention: Sequence[tuple[float, float, float]],
        ffn: Sequence[tuple[float, float, int]],
        transfer: Sequence[tuple[float, float]],
    ):
        """`attention`: (rows, context tokens, us); `ffn`: (rows, us, ranks); `transfer`: (rows, us)."""
        self._rows, self._fixed, self._per_token = _context_lines(attention)
        self._ffn = {ranks: _curve([(rows, us) for rows, us, at in ffn if at == ranks]) for ranks in {at for _, _, at in ffn}}
        self._transfer = _curve(transfer) if transfer else _curve([(0.0, 0.0)])

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Raises ValueError in one line when the file is not a profile."""
        try:
            raw = json.loads(path.read_text())
            width = float(raw.get("bytes_per_row", 1.0))
            return cls(
                [(p["rows"], p["context_tokens"], p["us"]) for p in raw["attention"]],
                [(p["rows"], p["us"], p.get("ranks", 1)) for p in raw["ffn"]],
                [(p["bytes"] / width, p["us"]) for p in raw.get("transfer", [])],
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: is no profile of stage times: {error!r}") from None

    def attention_us(self, rows: float) -> tuple[float, float]:
        return _between(rows, self._rows, self._fixed), _between(rows, self._rows, self._per_token)

    def ffn_us(self, rows: float, shape: Shape) -> float:
        measured = min(self._ffn, key=lambda ranks: (abs(math.log(ranks / shape.ranks)), ranks))
        return _between(rows, *self._ffn[measured]) * measured / shape.ranks

    def transfer_us(self, rows: float) -> float:
        return _between(rows, *self._transfer)


def line_of(pace: Pace | None) -> CostLine:
    """What a configured pace says; None: no time at all."""
    return CostLine(pace.base_us, pace.per_row_us, pace.per_context_token_us) if pace else CostLine()


def _context_lines(points: Sequence[tuple[float, float, float]]) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
    """Row counts, and for each the us without context and those a token, by least squares; none is negative.

    Where a row count was measured with one context only, a token costs what it does at the counts around.
    """
    measured = {rows: np.array([p[1:] for p in points if p[0] == rows], dtype=float) for rows in sorted({p[0] for p in points})}
    rows = np.array(list(measured))
    slopes = {count: _slope(*of_rows.T) for count, of_rows in measured.items() if np.ptp(of_rows[:, 0])}
    known = np.array(list(slopes)), np.array(list(slopes.values()))
    per_token = np.interp(rows, *known) if slopes else np.zeros(len(rows))
    means = np.array([of_rows.mean(axis=0) for of_rows in measured.values()])
    return rows, np.maximum(0.0, means[:, 1] - per_token * means[:, 0]), per_token


def _slope(context: "np.ndarray", us: "np.ndarray") -> float:
    spread = context - context.mean()
    return max(0.0, float((spread * us).sum() / (spread**2).sum()))


def _curve(points: Sequence[tuple[float, float]]) -> tuple["np.ndarray", "np.ndarray"]:
    """In the order of x; of several measurements at one x the median, for some are disturbed."""
    xs = sorted({x for x, _ in points})
    ys = [statistics.median(y for at, y in points if at == x) for x in xs]
    return np.array(xs, dtype=float), np.array(ys, dtype=float)


def _between(x: float, xs: "np.ndarray", ys: "np.ndarray") -> float:
    """By straight lines; beyond the ends the outermost line goes on, but never below zero."""
    if len(xs) == 1 or xs[0] <= x <= xs[-1]:
        return float(np.interp(x, xs, ys))
    i, j = (0, 1) if x < xs[0] else (-2, -1)
    return max(0.0, float(ys[i] + (ys[j] - ys[i]) * (x - xs[i]) / (xs[j] - xs[i])))
