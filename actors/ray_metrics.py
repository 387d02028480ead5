"""An actor's metrics through `ray.util.metrics`: at a Ray cluster's own endpoints they have the same names after `ray_`."""

from collections.abc import Iterable

from ray.util.metrics import Counter, Gauge

from afd_ray.metrics import CATALOGUE, Sample

NOTHING = float("nan")
"""Set where there is nothing to measure any more: Ray leaves such a series out, and would otherwise go on with its last value."""

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name and the labels of one of its series."""


class RayMetrics:
    """Publishes samples; called off the step loop, every few seconds."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[Series, float] = {}
        self._shown: set[Series] = set()

    def publish(self, samples: Iterable[Sample]) -> None:
        shown = set()
        for name, labels, value in samples:
            series = name, tuple(labels.items())
            if CATALOGUE[name].kind == "counter":
                self._count(series, value)
            else:
                self._show(series, value)
                shown.add(series)
        for series in self._shown - shown:
            self._show(series, NOTHING)
        self._shown = shown

    def _show(self, series: Series, value: float) -> None:
        name, labels = series
        if name not in self._gauges:
            metric = CATALOGUE[name]
            self._gauges[name] = Gauge(metric.family, metric.help, metric.labels)
        self._gauges[name].set(value, dict(labels))

    def _count(self, series: Series, value: float) -> None:
        """Ray is told what has been added since the last time."""
        name, labels = series
        if name not in self._counters:
            metric = CATALOGUE[name]
            self._counters[name] = Counter(metric.family, metric.help, metric.labels)
        added = value - self._counted.get(series, 0.0)
        if added > 0:
            self._counters[name].inc(added, dict(labels))
            self._counted[series] = value
