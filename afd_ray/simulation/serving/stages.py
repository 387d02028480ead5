"""How long simulated stages last: from lines (paced actors), from a cost model, or from a profile of a live cluster."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from afd_ray.config import Pace
from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving.profile_file import Alone, AttentionPoint, FfnPoint, ProfileFile

Scaling = Literal["shared", "routed", "none"]


class Shape(NamedTuple):
    """What the FFN's work is divided over."""

    instances: int
    tensor_parallel: int = 1

    @property
    def ranks(self) -> int:
        return self.instances * self.tensor_parallel


class Company(NamedTuple):
    """How many times as long stages last as the model says, for ranks that have a machine or a network to themselves, or share it with fewer than it was measured with."""

    attention: float = 1.0
    ffn: float = 1.0
    transfer: float = 1.0


class StageModel(Protocol):
    """Microseconds of one layer of one micro-batch."""

    def attention_us(self, rows: float) -> tuple[float, float]:
        """For so many rows: what it takes without context, and what each cached token adds."""
        ...

    def attention_by_layer(self, rows: float, layers: int) -> Sequence[float]:
        """How many times as long as that each layer lasts, and then the head: as many as there are layers in all."""
        ...

    def attention_spread(self, rows: float) -> float:
        """How much a layer differs from micro-batch to micro-batch: the Gini coefficient of how long it lasts, 0 to less than 1."""
        ...

    def ffn_us(self, rows: float, shape: Shape) -> float:
        """For the rows of all attention ranks together."""
        ...

    def ffn_by_layer(self, rows: float, layers: int) -> Sequence[float]:
        """How many times as long as that each layer lasts."""
        ...

    def ffn_spread(self, rows: float) -> float:
        """As `attention_spread`."""
        ...

    def transfer_us(self, rows: float) -> float:
        """Both ways, for one attention rank's rows."""
        ...

    def company(self, busy: int) -> "Company":
        """With so many attention ranks that have work."""
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

    def attention_by_layer(self, rows: float, layers: int) -> Sequence[float]:
        return (*(1.0,) * layers, 0.0)

    def ffn_by_layer(self, rows: float, layers: int) -> Sequence[float]:
        return (1.0,) * layers

    def attention_spread(self, rows: float) -> float:
        return 0.0

    def ffn_spread(self, rows: float) -> float:
        return 0.0

    def ffn_us(self, rows: float, shape: Shape) -> float:
        if self.scaling == "shared":
            return self.ffn.duration_us(rows) / shape.ranks
        if self.scaling == "routed":
            return self.ffn.duration_us(rows * share_of_rows(shape.instances, self.experts, self.chosen))
        return self.ffn.duration_us(rows)

    def transfer_us(self, rows: float) -> float:
        return self.transfer.duration_us(rows)

    def company(self, busy: int) -> Company:
        return Company()


def share_of_rows(instances: int, experts: int, chosen: int) -> float:
    """Of rows that choose experts evenly, how many have one in a given instance: 1 - C(E - E/N, k) / C(E, k)."""
    elsewhere = experts - experts // instances
    return 1 - math.comb(elsewhere, chosen) / math.comb(experts, chosen)


class Profile:
    """Measured stage times, between the measured points by straight lines, beyond them by the nearest one.

    `ProfileFile` says what there is of each: numbers of rows, context, layers, how much they differ, and what one rank alone measured.
    """

    def __init__(
        self,
        attention: Sequence[tuple[float, float, float]],
        ffn: Sequence[tuple[float, float, int]],
        transfer: Sequence[tuple[float, float]],
        attention_by_layer: Mapping[float, Sequence[float]] | None = None,
        ffn_by_layer: Mapping[float, Sequence[float]] | None = None,
    ):
        """`attention`: (rows, context tokens, us); `ffn`: (rows, us, ranks); `transfer`: (rows, us); layers by rows."""
        self._rows, self._fixed, self._per_token = _context_lines(attention)
        self._ffn = {ranks: _curve([(rows, us) for rows, us, at in ffn if at == ranks]) for ranks in {at for _, _, at in ffn}}
        self._transfer = _curve(transfer) if transfer else _curve([(0.0, 0.0)])
        self._ranks, self._alone = 1, Company()
        self._attention_by_layer, self._ffn_by_layer = _Layers(attention_by_layer or {}), _Layers(ffn_by_layer or {})
        self._attention_spread = self._ffn_spread = _curve([(0.0, 0.0)])

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """Raises ValueError in one line when the file is not a profile, OSError when it cannot be read."""
        file = ProfileFile.read(path)
        width = file.bytes_per_row
        profile = cls(
            [(p.rows, p.context_tokens, p.us) for p in file.attention],
            [(p.rows, p.us, p.ranks) for p in file.ffn],
            [(p.bytes / width, p.us) for p in file.transfer],
            _layers_of(file.attention),
            _layers_of(file.ffn),
        )
        profile._attention_spread, profile._ffn_spread = _spreads_of(file.attention), _spreads_of(file.ffn)
        profile._compare(file.alone, width)
        return profile

    def attention_us(self, rows: float) -> tuple[float, float]:
        return _between(rows, self._rows, self._fixed), _between(rows, self._rows, self._per_token)

    def attention_by_layer(self, rows: float, layers: int) -> Sequence[float]:
        return self._attention_by_layer.at(rows, (*(1.0,) * layers, 0.0))

    def ffn_by_layer(self, rows: float, layers: int) -> Sequence[float]:
        return self._ffn_by_layer.at(rows, (1.0,) * layers)

    def attention_spread(self, rows: float) -> float:
        return float(np.interp(rows, *self._attention_spread))

    def ffn_spread(self, rows: float) -> float:
        return float(np.interp(rows, *self._ffn_spread))

    def ffn_us(self, rows: float, shape: Shape) -> float:
        measured = min(self._ffn, key=lambda ranks: (abs(math.log(ranks / shape.ranks)), ranks))
        return _between(rows, *self._ffn[measured]) * measured / shape.ranks

    def transfer_us(self, rows: float) -> float:
        return _between(rows, *self._transfer)

    def company(self, busy: int) -> Company:
        if busy >= self._ranks:
            return Company()
        share = (busy - 1) / (self._ranks - 1)
        return Company(*(alone + (1 - alone) * share for alone in self._alone))

    def _compare(self, alone: Alone, width: float) -> None:
        """What one rank alone measured, with what is said of all of them."""
        self._ranks = alone.ranks
        ratios: tuple[list[float], ...] = ([], [], [])
        for attention in alone.attention:
            fixed, per_token = self.attention_us(attention.rows)
            ratios[0].append(attention.us / max(1e-3, fixed + per_token * attention.context_tokens))
        for ffn in alone.ffn:
            ratios[1].append(ffn.us / max(1e-3, self.ffn_us(ffn.rows, Shape(ffn.ranks))))
        for transfer in alone.transfer:
            ratios[2].append(transfer.us / max(1e-3, self.transfer_us(transfer.bytes / width)))
        self._alone = Company(*(statistics.median(found) if found else 1.0 for found in ratios))


class _Layers:
    """Those of the nearest number of rows, by ratio."""

    def __init__(self, by_rows: Mapping[float, Sequence[float]]) -> None:
        self._by_rows = dict(by_rows)
        self._found: dict[float, Sequence[float]] = {}

    def at(self, rows: float, otherwise: Sequence[float]) -> Sequence[float]:
        """`otherwise`: where none were measured, or those of another number of layers."""
        if rows not in self._found:
            nearest = min(self._by_rows, key=lambda known: abs(math.log(max(known, 1e-9) / max(rows, 1e-9))), default=None)
            self._found[rows] = otherwise if nearest is None else self._by_rows[nearest]
        found = self._found[rows]
        return found if len(found) == len(otherwise) else otherwise


def _layers_of(points: Sequence[AttentionPoint] | Sequence[FfnPoint]) -> dict[float, list[float]]:
    """Of the points that have them; of those of one number of rows the medians."""
    measured: dict[float, list[Sequence[float]]] = {}
    for point in points:
        if point.by_layer:
            measured.setdefault(point.rows, []).append(point.by_layer)
    return {rows: [statistics.median(layer) for layer in zip(*of_rows, strict=True)] for rows, of_rows in measured.items()}


def _spreads_of(points: Sequence[AttentionPoint] | Sequence[FfnPoint]) -> tuple["np.ndarray", "np.ndarray"]:
    """Of the points that have one, by rows."""
    return _curve([(point.rows, point.spread) for point in points if point.spread is not None] or [(0.0, 0.0)])


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
