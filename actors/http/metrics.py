"""What an ingress replica counts, and the Prometheus text over all replicas."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from afd_ray.metrics import CATALOGUE, Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

Snapshot = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
"""Families of one replica: (name, help, type, [(sample name, labels, value)])."""


class IngressMetrics:
    """The counters of one ingress replica, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("afd_http_requests", "HTTP requests answered", ("route", "status"), registry=registry)
        self.in_flight = 0
        """HTTP requests being answered."""
        self._in_flight = Gauge("afd_http_requests_in_flight", "HTTP requests being answered", registry=registry)
        self._tasks = Gauge(
            "afd_ingress_tasks", "Tasks alive in the ingress: grows when something is left behind", registry=registry
        )
        self._duration = Histogram(
            "afd_http_request_duration_seconds",
            "From request to last byte",
            ("route",),
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._ttft = Histogram(
            "afd_time_to_first_token_seconds", "From request to first token", buckets=_TTFT_BUCKETS_S, registry=registry
        )
        self._tpot = Histogram(
            "afd_time_per_output_token_seconds", "Mean after the first token", buckets=_TPOT_BUCKETS_S, registry=registry
        )
        self._finished = Counter("afd_choices_finished", "Choices ended", ("reason",), registry=registry)
        self._moved = Counter(
            "afd_requests_moved", "Times that a request went on with another attention actor", registry=registry
        )
        self._prompt = Counter("afd_prompt_tokens", "Prompt tokens of started choices", registry=registry)
        self._generated = Counter("afd_generation_tokens", "Tokens generated", registry=registry)

    def request_started(self) -> None:
        self.in_flight += 1
        self._in_flight.inc()

    def request_ended(self, route: str, status: int, duration_s: float) -> None:
        self.in_flight -= 1
        self._in_flight.dec()
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(duration_s)

    def tasks_alive(self, count: int) -> None:
        self._tasks.set(count)

    def request_moved(self) -> None:
        self._moved.inc()

    def first_token(self, ttft_s: float, prompt_tokens: int) -> None:
        self._prompt.inc(prompt_tokens)
        self._ttft.observe(ttft_s)

    def choice_ended(self, reason: str, tokens: int, after_first_s: float) -> None:
        self._finished.labels(reason).inc()
        self._generated.inc(tokens)
        if tokens > 1:
            self._tpot.observe(after_first_s / (tokens - 1))

    def snapshot(self) -> Snapshot:
        return [
            (
                metric.name,
                metric.documentation,
                metric.type,
                [(s.name, dict(s.labels), s.value) for s in metric.samples if _wanted(s.name)],
            )
            for metric in self._registry.collect()
        ]


def _wanted(sample_name: str) -> bool:
    return not sample_name.endswith("_created")


def render(snapshots: Mapping[str, Snapshot], samples: Iterable[Sample]) -> bytes:
    """Prometheus text: every replica's samples with a `replica` label, and the cluster's own, which are in the catalogue."""
    return generate_latest(_Merged(snapshots, samples))


class _Merged(Collector):
    def __init__(self, snapshots: Mapping[str, Snapshot], samples: Iterable[Sample]) -> None:
        self._snapshots, self._samples = snapshots, samples

    def collect(self, *_: Any) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, snapshot in sorted(self._snapshots.items()):
            for name, documentation, kind, samples in snapshot:
                family = families.setdefault(name, Metric(name, documentation, kind))
                for sample_name, labels, value in samples:
                    family.add_sample(sample_name, {**labels, "replica": replica}, value)
        for sample in self._samples:
            metric = CATALOGUE[sample.name]
            family = families.setdefault(metric.name, Metric(metric.family, metric.help, metric.kind))
            family.add_sample(metric.name, dict(sample.labels), sample.value)
        yield from families.values()


class MetricsBoard:
    """The latest snapshot of each ingress replica, kept where all of them can reach it."""

    def __init__(self, forget_after_s: float = 60.0) -> None:
        self._forget_after_s = forget_after_s
        self._posted: dict[str, tuple[float, Snapshot]] = {}

    def exchange(self, replica: str, snapshot: Snapshot, now_s: float) -> dict[str, Snapshot]:
        """Posts one, and gives all; replicas that have not posted for long are gone."""
        self._posted[replica] = (now_s, snapshot)
        self._posted = {name: (at_s, kept) for name, (at_s, kept) in self._posted.items() if now_s - at_s <= self._forget_after_s}
        return {name: kept for name, (_, kept) in self._posted.items()}
