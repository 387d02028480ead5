"""An actor's metrics through `ray.util.metrics`: at the Ray cluster's own Prometheus endpoints they have the same names after `ray_`."""

from collections.abc import Iterable

from ray.util.metrics import Counter, Gauge

from afd_ray.metrics import CATALOGUE, Metric, Sample

NOTHING = float("nan")
"""Set where there is nothing to measure any more: Ray leaves such a series out, and would otherwise go on with its last value."""

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name and the labels of one of its series."""


class RayMetrics:
    """Publishes samples; called off the step loop, every few seconds."""

    def __init__(self) -> None:
        self._families: dict[str, Counter | Gauge] = {}
        self._counted: dict[Series, float] = {}
        self._shown: set[Series] = set()

    def publish(self, samples: Iterable[Sample]) -> None:
        shown = set()
        for name, labels, value in samples:
            family = self._family(CATALOGUE[name])
            series = name, tuple(labels.items())
            if isinstance(family, Gauge):
                family.set(value, dict(labels))
                shown.add(series)
            elif value > self._counted.get(series, 0.0):
                family.inc(value - self._counted.get(series, 0.0), dict(labels))
                self._counted[series] = value
        for name, pairs in self._shown - shown:
            gauge = self._families[name]
            assert isinstance(gauge, Gauge)
            gauge.set(NOTHING, dict(pairs))
        self._shown = shown

    def _family(self, metric: Metric) -> Counter | Gauge:
        family = self._families.get(metric.name)
        if family is None:
            kind = Gauge if metric.kind == "gauge" else Counter
            family = self._families[metric.name] = kind(metric.family, metric.help, metric.labels)
        return family
