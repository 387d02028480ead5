"""What a cluster exports, by stable names: the same through `/metrics` and through Ray. Units are in the names, as Prometheus has them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from afd_ray.histogram import Histogram
from afd_ray.measured import Measured, MeasuredFFN, StagesUs, bubble

QUANTILES = (0.5, 0.95, 0.99)
CLUSTER: tuple[str, ...] = ()
ACTOR = ("actor", "role")
STAGE = (*ACTOR, "stage")


class Metric(NamedTuple):
    """One family. A counter's name ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...]

    @property
    def family(self) -> str:
        """The name without what marks its samples as a counter's."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name


class Sample(NamedTuple):
    name: str
    labels: Mapping[str, str]
    value: float


Reading = tuple[Metric, Callable[[Any], float | None]]
Latency = tuple[Metric, Callable[[Any], Histogram], float]
"""With what a value is multiplied by to be in the metric's unit."""


def _gauge(name: str, text: str, labels: tuple[str, ...] = ACTOR) -> Metric:
    return Metric(f"afd_{name}", "gauge", text, labels)


def _counter(name: str, text: str, labels: tuple[str, ...] = ACTOR) -> Metric:
    return Metric(f"afd_{name}_total", "counter", text, labels)


def _quantile(name: str, text: str, labels: tuple[str, ...] = ACTOR) -> Metric:
    return Metric(f"afd_{name}", "gauge", f"{text}, over the last minute", (*labels, "quantile"))


_OF_ATTENTION: tuple[Reading, ...] = (
    (_gauge("requests_running", "Requests that decode or compute their prompt"), lambda m: m.running),
    (_gauge("requests_waiting", "Requests that are not admitted yet"), lambda m: m.waiting),
    (_gauge("oldest_waiting_seconds", "How long the oldest request has waited to begin"), lambda m: m.oldest_waiting_s or 0.0),
    (_gauge("context_tokens", "Cached tokens of the running requests"), lambda m: m.context_tokens),
    (_gauge("kv_blocks_used", "KV blocks that are taken"), lambda m: m.kv_used),
    (_gauge("kv_blocks_total", "KV blocks that there are"), lambda m: m.kv_total),
    (_counter("requests_arrived", "Requests that came new"), lambda m: m.arrivals),
    (_counter("requests_completed", "Requests that ended"), lambda m: m.completions),
    (
        _counter("requests_late", "Requests that ended, whose first token or tokens on average came later than their target"),
        lambda m: m.late,
    ),
    (_counter("preemptions", "Requests that gave up their KV blocks to older ones"), lambda m: m.preemptions),
    (
        _counter("prompt_tokens_computed", "Prompt tokens computed, again those of requests that start over"),
        lambda m: m.prompt_tokens,
    ),
    (_counter("output_tokens", "Tokens sent"), lambda m: m.output_tokens),
    (_counter("steps", "Micro-batches, at FFN ranks waves of them, that passed all layers"), lambda m: m.steps),
)
_LATENCIES: tuple[Latency, ...] = (
    (_quantile("tpot_seconds", "From one token of a request to its next, at the engine"), lambda m: m.tpot_ms, 1e-3),
    (_quantile("ttft_seconds", "From a request's arrival to its first token, at the engine"), lambda m: m.ttft_ms, 1e-3),
    (
        _quantile("queue_wait_seconds", "From a request's arrival until its first rows are computed"),
        lambda m: m.queue_wait_ms,
        1e-3,
    ),
    (_quantile("tokens_per_step", "Tokens that a micro-batch sent, where it sent any"), lambda m: m.tokens_per_step, 1.0),
)
_STEPS = _OF_ATTENTION[-1][0]
_FFN_ROWS = _counter("ffn_rows", "Rows of the waves that passed all layers")
_STAGE_SECONDS = _counter("stage_seconds", "Time spent in a stage: a layer of a micro-batch, its head, or one wait", STAGE)
_STAGE_RUNS = _counter("stage_runs", "How often a stage has run", STAGE)
_STAGE_TIME = _quantile("stage_time_seconds", "Time of one run of a stage", STAGE)
_BUBBLE = _gauge(
    "bubble_ratio", "Of the time with work under way, the share spent waiting for the other half, over the last minute"
)

_OF_STATUS: tuple[Reading, ...] = (
    (_gauge("epoch", "Number of the epoch that serves", CLUSTER), lambda s: s["epoch"]),
    (_gauge("attention_actors", "Attention actors that serve", CLUSTER), lambda s: _serving(s["attention"])),
    (_gauge("ffn_actors", "FFN actors that serve", CLUSTER), lambda s: _serving(s["ffn"])),
    (_gauge("tpot_target_seconds", "autoscaling.tpot_target_ms", CLUSTER), lambda s: s["targets_ms"]["tpot"] / 1000),
    (_gauge("ttft_target_seconds", "autoscaling.ttft_target_ms", CLUSTER), lambda s: s["targets_ms"]["ttft"] / 1000),
    (
        _gauge("requests_moved_with_kv", "Requests that came from another attention actor with their KV", CLUSTER),
        lambda s: _moved(s, "with_kv"),
    ),
    (
        _gauge(
            "requests_moved_and_recomputed", "Requests that came from another attention actor and were computed again", CLUSTER
        ),
        lambda s: _moved(s, "recomputed"),
    ),
    (
        _gauge("kv_fetches_failed", "Fetches of KV from another attention actor that failed", CLUSTER),
        lambda s: _moved(s, "failed"),
    ),
    (_gauge("kv_bytes_fetched", "Bytes of KV that came from other attention actors", CLUSTER), lambda s: _moved(s, "kv_bytes")),
    (_gauge("kv_fetching_ms", "Time that fetching KV from other attention actors took", CLUSTER), lambda s: _moved(s, "kv_ms")),
    (_gauge("last_resize_pause_seconds", "Pause of the last resize that held", CLUSTER), lambda s: _last_pause_s(s)),
    (_gauge("last_resize_rolled_back", "1 if the last resize was rolled back, else 0", CLUSTER), lambda s: _rolled_back(s)),
)
_STATE = _gauge("cluster_state", "1 for the state that the cluster is in", ("state",))
READY = _gauge("ready", "1 if this ingress replica takes requests, else 0", CLUSTER)
STALE_EPOCH_TOKENS = _gauge("stale_epoch_tokens", "Tokens of an epoch that came after one of a later epoch", CLUSTER)

CATALOGUE: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        *(metric for metric, _ in _OF_ATTENTION),
        *(metric for metric, *_ in _LATENCIES),
        *(_FFN_ROWS, _STAGE_SECONDS, _STAGE_RUNS, _STAGE_TIME, _BUBBLE),
        *(metric for metric, _ in _OF_STATUS),
        *(_STATE, READY, STALE_EPOCH_TOKENS),
    )
}
"""Every metric but those that the ingress counts of HTTP, by name."""


def attention_samples(actor: str, sums: Measured, recent: Measured) -> list[Sample]:
    """`sums`: since the actor's start; `recent`: the last minute."""
    labels = {"actor": actor, "role": "attention"}
    out = _read(_OF_ATTENTION, sums, labels)
    for metric, histogram, unit in _LATENCIES:
        out += _quantile_samples(metric, labels, histogram(recent), unit)
    return out + _stage_samples(labels, sums.stages, recent.stages)


def ffn_samples(actor: str, sums: MeasuredFFN, recent: MeasuredFFN) -> list[Sample]:
    """`sums`: since the actor's start; `recent`: the last minute."""
    labels = {"actor": actor, "role": "ffn"}
    counts = [Sample(_STEPS.name, labels, sums.steps), Sample(_FFN_ROWS.name, labels, sums.rows)]
    return counts + _stage_samples(labels, sums.stages, recent.stages)


def cluster_samples(status: Mapping[str, Any]) -> list[Sample]:
    """Of the cluster as a whole, by its status."""
    return [*_read(_OF_STATUS, status, {}), Sample(_STATE.name, {"state": status["state"]}, 1.0)]


def _read(readings: Iterable[Reading], source: Any, labels: Mapping[str, str]) -> list[Sample]:
    values = [(metric.name, read(source)) for metric, read in readings]
    return [Sample(name, labels, float(value)) for name, value in values if value is not None]


def _stage_samples(labels: Mapping[str, str], sums: StagesUs, recent: StagesUs) -> list[Sample]:
    out = []
    for stage, us in sums.items():
        of_stage = {**labels, "stage": stage}
        out += [Sample(_STAGE_SECONDS.name, of_stage, us.total / 1e6), Sample(_STAGE_RUNS.name, of_stage, us.count)]
    for stage, us in recent.items():
        out += _quantile_samples(_STAGE_TIME, {**labels, "stage": stage}, us, 1e-6)
    ratio = bubble(recent)
    return out if ratio is None else [*out, Sample(_BUBBLE.name, labels, ratio)]


def _quantile_samples(metric: Metric, labels: Mapping[str, str], values: Histogram, unit: float) -> list[Sample]:
    """No sample without values."""
    found = values.quantiles(*QUANTILES) or ()
    return [Sample(metric.name, {**labels, "quantile": str(q)}, value * unit) for q, value in zip(QUANTILES, found, strict=False)]


def _serving(actors: Iterable[Mapping[str, Any]]) -> float:
    return float(sum(actor["state"] == "running" for actor in actors))


def _moved(status: Mapping[str, Any], what: str) -> float:
    return float(status["moved_in"].get(what, 0))


def _last_pause_s(status: Mapping[str, Any]) -> float | None:
    pause_ms = (status["last_resize"] or {}).get("pause_ms")
    return None if pause_ms is None else pause_ms / 1000


def _rolled_back(status: Mapping[str, Any]) -> float:
    return float((status["last_resize"] or {}).get("outcome") == "rolled_back")
