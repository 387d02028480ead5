"""A deployment and what it would do: step time, throughput, memory and price, from its stages."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from afd_ray.engine.pipeline import predicted_period
from afd_ray.engine.stage_costs import StageTimes
from afd_ray.planning.accelerators import SERVER, Accelerator, Achieved
from afd_ray.planning.shapes import ModelShape
from afd_ray.planning.stages import attention_us, ffn_us, wire_us

USABLE_MEMORY = 0.9
"""The rest is for activations, buffers and the runtime."""

Bound = Literal["attention stage", "FFN stage", "network", "round trip", "attention memory", "FFN memory", "GPUs"]


class Deployment(NamedTuple):
    """Servers of 8 on both sides, and what they decode."""

    shape: ModelShape
    attention: Accelerator
    ffn: Accelerator
    attention_servers: int
    ffn_servers: int
    micro_batches: int
    """In flight for each attention accelerator."""
    rows: int
    """Of one micro-batch, on each attention accelerator."""
    context: int
    """Tokens cached for each row, on average."""

    @property
    def gpus(self) -> int:
        return SERVER * (self.attention_servers + self.ffn_servers)

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch over all attention accelerators: what an FFN server receives."""
        return self.rows * SERVER * self.attention_servers

    @property
    def batch(self) -> int:
        """Requests that decode at once."""
        return self.micro_batches * self.micro_batch

    @property
    def usd_per_hour(self) -> float:
        servers = self.attention_servers * self.attention.usd_per_hour.value + self.ffn_servers * self.ffn.usd_per_hour.value
        return SERVER * servers


class LayerKind(NamedTuple):
    """Layers whose stages last equally long."""

    share: float
    """Of all layers: kinds of attention and of FFN are taken to be spread evenly over each other."""
    times_us: StageTimes


class Memory(NamedTuple):
    """Bytes that one accelerator of each half holds."""

    attention_weights: float
    kv_cache: float
    ffn_weights: float

    @property
    def attention(self) -> float:
        return self.attention_weights + self.kv_cache


class Performance(NamedTuple):
    """What a deployment does while its batch is full."""

    tpot_ms: float
    tokens_per_s: float
    tokens_per_gpu_s: float
    usd_per_million: float
    times_us: StageTimes
    """Of the most common kind of layer."""
    slowest: Bound
    """What its period is made of."""


def layer_kinds(deployment: Deployment, achieved: Achieved) -> Iterator[LayerKind]:
    """The stages of each kind of layer."""
    d = deployment
    hidden, layers = d.shape.hidden_size, d.shape.layers
    network = achieved.network.value
    bytes_s = d.attention.nic_bytes_s * network, d.ffn.nic_bytes_s * network
    wire = wire_us(hidden, *bytes_s, d.attention_servers, d.ffn_servers, d.rows)
    ffn = [(group.layers, ffn_us(group, hidden, d.ffn, d.ffn_servers, d.micro_batch, achieved)) for group in d.shape.ffn]
    for group in d.shape.attention:
        attention = attention_us(group, hidden, d.attention, d.rows, d.context, achieved.attention.value)
        for count, us in ffn:
            yield LayerKind(group.layers * count / layers**2, wire._replace(attention=attention, ffn=us))


def period_us(times: StageTimes, micro_batches: int) -> float:
    """Of one layer, all micro-batches: as the engine predicts it, and no faster than either direction of the wire."""
    return max(predicted_period(times, micro_batches), micro_batches * max(times.a2f, times.f2a))


def bubble(times: StageTimes, micro_batches: int) -> float:
    """The share of a period in which the slower half waits."""
    return 1 - micro_batches * max(times.attention, times.ffn) / period_us(times, micro_batches)


def slowest_stage(times: StageTimes, micro_batches: int) -> Bound:
    """What `period_us` is made of."""
    bounds: dict[Bound, float] = {
        "attention stage": micro_batches * times.attention,
        "FFN stage": micro_batches * times.ffn,
        "network": micro_batches * max(times.a2f, times.f2a),
        "round trip": sum(times),
    }
    return max(bounds, key=lambda bound: bounds[bound])


def performance(deployment: Deployment, achieved: Achieved) -> Performance:
    """With the stages that the hardware's peaks and what is achieved of them give."""
    return performance_of(deployment, list(layer_kinds(deployment, achieved)))


def performance_of(deployment: Deployment, kinds: Sequence[LayerKind]) -> Performance:
    """With stages that are known for each kind of layer."""
    d = deployment
    tpot_us = d.shape.layers * sum(kind.share * period_us(kind.times_us, d.micro_batches) for kind in kinds)
    tokens_per_s = d.batch / tpot_us * 1e6
    times_us = max(kinds, key=lambda kind: kind.share).times_us
    return Performance(
        tpot_ms=tpot_us / 1e3,
        tokens_per_s=tokens_per_s,
        tokens_per_gpu_s=tokens_per_s / d.gpus,
        usd_per_million=d.usd_per_hour / 3600 / tokens_per_s * 1e6,
        times_us=times_us,
        slowest=slowest_stage(times_us, d.micro_batches),
    )


def memory(deployment: Deployment) -> Memory:
    d = deployment
    return Memory(
        attention_weights=d.shape.attention_side_bytes,
        kv_cache=d.micro_batches * d.rows * d.shape.held_bytes(d.context),
        ffn_weights=d.shape.ffn_side_bytes / (SERVER * d.ffn_servers),
    )
