"""The cheapest deployment that keeps a target: pools, micro-batches and rows on each pair of accelerators."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from afd_ray.engine.stage_costs import StageTimes
from afd_ray.planning.accelerators import SERVER, Accelerator, Achieved
from afd_ray.planning.deployment import USABLE_MEMORY, Bound, Deployment, Memory, Performance, memory, performance
from afd_ray.planning.shapes import ModelShape

TOLERANCE = 0.02
"""Among deployments that cost so little more, the smallest is taken: it fits more demands and loses less at a time."""


class Target(NamedTuple):
    """What is asked for."""

    shape: ModelShape
    gpus: Mapping[str, Accelerator]
    """Either half may run on any of them."""
    context: int
    """Tokens cached for a request, on average."""
    tpot_ms: float
    micro_batches: Sequence[int]
    """Counts that may be used."""
    max_gpus: int


class Plan(NamedTuple):
    """The cheapest deployment on a pair of accelerators, by their names in the catalogue."""

    attention: str
    ffn: str
    deployment: Deployment
    performance: Performance
    memory: Memory
    bound: Bound
    """What forbids one row more."""


class Infeasible(ValueError):
    """No deployment meets the target: one line with what binds and the nearest that is feasible."""


def plans(target: Target, achieved: Achieved) -> list[Plan]:
    """The best of each pair of accelerators that can meet the target, cheapest first. Raises Infeasible."""
    best = [plan for attention, ffn in product(target.gpus, repeat=2) if (plan := _best(target, attention, ffn, achieved))]
    if not best:
        raise Infeasible(_why_not(target, achieved))
    return sorted(best, key=lambda plan: plan.performance.usd_per_million)


def _best(target: Target, attention: str, ffn: str, achieved: Achieved) -> Plan | None:
    candidates = [
        (largest, performance(largest, achieved))
        for smallest in _pools(target, attention, ffn)
        for count in target.micro_batches
        if (largest := _with_most_rows(smallest._replace(micro_batches=count), target.tpot_ms, achieved))
    ]
    if not candidates:
        return None
    least_usd = min(reached.usd_per_million for _, reached in candidates)
    good = [c for c in candidates if c[1].usd_per_million <= least_usd * (1 + TOLERANCE)]
    deployment, reached = min(good, key=lambda c: (c[0].gpus, c[1].usd_per_million))
    return Plan(attention, ffn, deployment, reached, memory(deployment), _bound(deployment, achieved))


def _pools(target: Target, attention: str, ffn: str) -> Iterator[Deployment]:
    """Every pair of pools that the GPUs allow and that holds the FFN weights, with one row in one micro-batch."""
    a, f = target.gpus[attention], target.gpus[ffn]
    most = target.max_gpus // SERVER
    most_ffn = min(most - 1, target.shape.fewest_experts or most)
    for ffn_servers in _pool_sizes(_least_ffn_servers(target.shape, f), most_ffn):
        for attention_servers in _pool_sizes(1, most - ffn_servers):
            yield Deployment(target.shape, a, f, attention_servers, ffn_servers, 1, 1, target.context)


def _pool_sizes(least: int, most: int) -> Iterator[int]:
    """Every size up to 16, then steps of an eighth to a sixteenth."""
    return (n for n in range(least, most + 1) if n in (least, most) or n % (1 << max(0, n.bit_length() - 4)) == 0)


def _least_ffn_servers(shape: ModelShape, gpu: Accelerator) -> int:
    return math.ceil(shape.ffn_side_bytes / (SERVER * USABLE_MEMORY * gpu.memory_bytes))


def _rows_in_memory(deployment: Deployment) -> int:
    """Rows of a micro-batch whose caches fit beside attention's weights."""
    free = USABLE_MEMORY * deployment.attention.memory_bytes - deployment.shape.attention_side_bytes
    return max(0, int(free / (deployment.micro_batches * deployment.shape.held_bytes(deployment.context))))


def _with_most_rows(deployment: Deployment, tpot_ms: float, achieved: Achieved) -> Deployment | None:
    """The same with as many rows as memory and target allow; None where not even one is."""
    low, high = 0, _rows_in_memory(deployment)
    while low < high:
        middle = (low + high + 1) // 2
        if performance(deployment._replace(rows=middle), achieved).tpot_ms <= tpot_ms:
            low = middle
        else:
            high = middle - 1
    return deployment._replace(rows=low) if low else None


def _bound(deployment: Deployment, achieved: Achieved) -> Bound:
    if deployment.rows >= _rows_in_memory(deployment):
        return "attention memory"
    return performance(deployment._replace(rows=deployment.rows + 1), achieved).slowest


def _why_not(target: Target, achieved: Achieved) -> str:
    shape, most = target.shape, target.max_gpus // SERVER
    fewest = min(target.micro_batches)
    roomy = max(target.gpus.values(), key=lambda gpu: gpu.memory_bytes)
    one = Deployment(shape, roomy, roomy, 1, 1, fewest, 1, target.context)
    if not _rows_in_memory(one):
        return _too_long(one)
    needed = 1 + min(_least_ffn_servers(shape, gpu) for gpu in target.gpus.values())
    if needed > most:
        return (
            f"max-gpus: {target.max_gpus} cannot hold {shape.name}: {shape.ffn_side_bytes / 1e9:.0f} GB of FFN weights and "
            f"a server of attention need at least {needed * SERVER}"
        )
    least, (attention, ffn) = _quickest(target, achieved)
    return (
        f"tpot-ms: {target.tpot_ms:g} cannot be met with {target.max_gpus} GPUs at most, the least is {least.tpot_ms:.1f} "
        f"(attention on {attention}, FFN on {ffn}), bound by the {least.slowest} {_made_of(least.times_us)}"
    )


def _made_of(times: StageTimes) -> str:
    a, f, wire = times.attention, times.ffn, times.a2f + times.f2a
    return f"(a layer takes attention {a:.0f}, FFN {f:.0f} and the network {wire:.0f} us, with one row)"


def _too_long(deployment: Deployment) -> str:
    shape, gpu = deployment.shape, deployment.attention
    free = USABLE_MEMORY * gpu.memory_bytes - shape.attention_side_bytes
    if free <= 0:
        return (
            f"hardware: {shape.name}'s attention weights take {shape.attention_side_bytes / 1e9:.1f} GB on every accelerator, "
            f"and {USABLE_MEMORY:.0%} of the {gpu.name}'s memory is {USABLE_MEMORY * gpu.memory_bytes / 1e9:.1f} GB"
        )
    per_row = deployment.micro_batches * shape.held_bytes(deployment.context)
    return (
        f"context: at {deployment.context} tokens the cache of {deployment.micro_batches} request(s) takes {per_row / 1e9:.1f} GB, and "
        f"the {gpu.name} has {free / 1e9:.1f} GB beside attention's weights; at most {int(deployment.context * free / per_row)} tokens fit"
    )


def _quickest(target: Target, achieved: Achieved) -> tuple[Performance, tuple[str, str]]:
    """The least step time of all pools, with one row."""
    reached = (
        (performance(pools._replace(micro_batches=count), achieved), (attention, ffn))
        for attention, ffn in product(target.gpus, repeat=2)
        for pools in _pools(target, attention, ffn)
        for count in target.micro_batches
        if _rows_in_memory(pools._replace(micro_batches=count))
    )
    return min(reached, key=lambda found: found[0].tpot_ms)
