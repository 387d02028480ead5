"""What the paper's deployments would do with the stage times that one accelerator was measured to have, beside what the paper printed."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from afd_ray.engine.stage_costs import StageTimes
from afd_ray.planning import catalogue
from afd_ray.planning.accelerators import SERVER, Accelerator, Achieved
from afd_ray.planning.costs import COMBINE_BYTES, DISPATCH_BYTES
from afd_ray.planning.deployment import Deployment, LayerKind, Performance, performance_of
from afd_ray.planning.measured import Measured, estimate
from afd_ray.planning.reproduce import MICRO_BATCHES
from afd_ray.planning.shapes import AttentionLayers, Dense, Experts, ModelShape
from afd_ray.planning.stages import attention_us, ffn_us, wire_us

Stage = Literal["attention", "a2f", "ffn", "f2a"]
Basis = Literal["measured", "extended", "assumed"]
"""At or between points that were measured; beyond them, or of a cache of another precision; from the catalogue's peaks and shares of them."""

ALWAYS_ASSUMED = (
    f"servers of {SERVER} equal accelerators, {MICRO_BATCHES} micro-batches in flight",
    "every layer lasts as long as the measured kind: dense layers as long as MoE layers",
    "messages of one network card go one after the other",
    "left out: embedding, head and sampling, uneven experts and contexts, one stage slowing another down",
)


class Part(NamedTuple):
    """A part of a stage of one layer."""

    stage: Stage
    what: str
    us: float
    basis: Basis


class Projection(NamedTuple):
    """One of the paper's deployments."""

    name: str
    deployment: Deployment
    parts: tuple[Part, ...]
    performance: Performance
    paper_tokens_per_gpu_s: float

    @property
    def deviation(self) -> float:
        """From the paper, as a share."""
        return self.performance.tokens_per_gpu_s / self.paper_tokens_per_gpu_s - 1


def projections(measured: Measured) -> Iterator[Projection]:
    """The deployments that the paper ran, in its order (Table 8)."""
    achieved = catalogue.hardware().achieved
    for row in catalogue.read("published.yaml")["deployments"]:
        if row.get("ran"):
            deployment = _deployment(row, measured)
            parts = tuple(_parts(deployment, measured, achieved))
            times = StageTimes(*(sum(part.us for part in parts if part.stage == stage) for stage in StageTimes._fields))
            reached = performance_of(deployment, [LayerKind(1.0, times)])
            yield Projection(row["name"], deployment, parts, reached, row.get("measured", row["printed"]))


def describe(projection: Projection) -> dict[str, Any]:
    """As plain values: what `afd-ray plan --measured --json` prints of it."""
    d, reached = projection.deployment, projection.performance
    return {
        "name": projection.name,
        "gpus": d.gpus,
        "context": d.context,
        "cache_bytes": d.shape.attention[0].cache_bytes,
        "batch": d.batch,
        "micro_batch": d.micro_batch,
        "rows_per_attention_rank": d.rows,
        "parts": [part._asdict() | {"us": round(part.us, 1)} for part in projection.parts],
        "stages_us": {stage: round(us, 1) for stage, us in reached.times_us._asdict().items()},
        "binding": reached.slowest,
        "tpot_ms": round(reached.tpot_ms, 2),
        "tokens_per_gpu_s": round(reached.tokens_per_gpu_s, 1),
        "paper_tokens_per_gpu_s": projection.paper_tokens_per_gpu_s,
        "deviation": round(projection.deviation, 4),
    }


def _deployment(row: dict[str, Any], measured: Measured) -> Deployment:
    shape = catalogue.model(measured.model).with_cache_bytes(row["cache_bytes"])
    gpu = catalogue.accelerator(measured.accelerator_name or "")
    rows = row["batch"] // (MICRO_BATCHES * SERVER * row["attention"])
    return Deployment(shape, gpu, gpu, row["attention"], row["ffn"], MICRO_BATCHES, rows, row["context"])


def _parts(d: Deployment, measured: Measured, achieved: Achieved) -> Iterator[Part]:
    yield from _attention(d, measured, achieved)
    yield from _ffn(d, measured, achieved)
    yield from _handoff(d, measured, achieved)


def _attention(d: Deployment, measured: Measured, achieved: Achieved) -> Iterator[Part]:
    """By bytes of cache, which is what the time of attention grows with."""
    layer, share = d.shape.attention[0], achieved.attention.value
    for part in ("layer", "core"):
        times = [time for time in measured.attention if time.part == part]
        alike = [time for time in times if time.cache_bytes == layer.cache_bytes]
        if not times:
            continue
        points = [(_cached(layer, t.rows, t.context, t.cache_bytes), t.us) for t in alike or times]
        found = estimate(points, _cached(layer, d.rows, d.context, layer.cache_bytes))
        yield Part("attention", f"attention {part}", found.us, "measured" if alike and found.measured else "extended")
        if part == "core":
            projections_us = attention_us(layer, d.shape.hidden_size, d.attention, d.rows, 0, share)
            yield Part("attention", "projections", projections_us, "assumed")
        return
    whole_us = attention_us(layer, d.shape.hidden_size, d.attention, d.rows, d.context, share)
    yield Part("attention", "attention layer", whole_us, "assumed")


def _cached(layer: AttentionLayers, rows: int, context: int, cache_bytes: int) -> float:
    return float(rows * layer.cache_values(context) * cache_bytes)


def _ffn(d: Deployment, measured: Measured, achieved: Achieved) -> Iterator[Part]:
    """By rows, of ranks that hold as much as the deployment's."""
    layer, ranks = _experts(d.shape), SERVER * d.ffn_servers
    for part in ("layer", "routed"):
        points = [(float(time.rows), time.us) for time in measured.ffn if (time.part, time.ranks) == (part, ranks)]
        if not points:
            continue
        found = estimate(points, d.micro_batch)
        what = "FFN layer" if part == "layer" else "routed experts"
        yield Part("ffn", what, found.us, "measured" if found.measured else "extended")
        if part == "routed":
            shared = Dense(layers=layer.layers, width=layer.shared_width)
            rest_us = ffn_us(shared, d.shape.hidden_size, d.ffn, d.ffn_servers, d.micro_batch, achieved)
            yield Part("ffn", "shared expert, exchange in the server", rest_us, "assumed")
        return
    whole_us = ffn_us(layer, d.shape.hidden_size, d.ffn, d.ffn_servers, d.micro_batch, achieved)
    yield Part("ffn", "FFN layer", whole_us, "assumed")


def _experts(shape: ModelShape) -> Experts:
    return next(group for group in shape.ffn if isinstance(group, Experts))


def _handoff(d: Deployment, measured: Measured, achieved: Achieved) -> Iterator[Part]:
    """By bytes: a rank talks to one rank of each server of the other half."""
    points = [(float(time.message_bytes), time.us) for time in measured.handoff]
    bytes_s = _network(d.attention, achieved), _network(d.ffn, achieved)
    assumed = wire_us(d.shape.hidden_size, *bytes_s, d.attention_servers, d.ffn_servers, d.rows)
    messages = max(d.attention_servers, d.ffn_servers)
    ways: tuple[tuple[Stage, int, str], ...] = (("a2f", DISPATCH_BYTES, "rows to FFN"), ("f2a", COMBINE_BYTES, "rows back"))
    for stage, value_bytes, what in ways:
        if points:
            found = estimate(points, d.rows * d.shape.hidden_size * value_bytes)
            yield Part(stage, what, messages * found.us, "measured" if found.measured else "extended")
        else:
            yield Part(stage, what, getattr(assumed, stage), "assumed")


def _network(gpu: Accelerator, achieved: Achieved) -> float:
    return gpu.nic_bytes_s * achieved.network.value
