"""What people are shown of measurements: a few figures, in the units of their names; None where there was nothing to measure."""

from collections.abc import Iterable, Sequence
from typing import Any

from afd_ray.histogram import Histogram
from afd_ray.measured import Measured, StagesUs, bubble, merged


def quantiles(values: Histogram) -> dict[str, float] | None:
    """p50, p95 and p99."""
    found = values.quantiles(0.50, 0.95, 0.99)
    return dict(zip(("p50", "p95", "p99"), (round(value, 3) for value in found), strict=True)) if found else None


def served(recent: Sequence[Measured]) -> dict[str, Any]:
    """What attention actors did for requests in the times measured, taken together."""
    tokens = merged(look.tokens_per_step for look in recent).mean
    return {
        "tpot_ms": quantiles(merged(look.tpot_ms for look in recent)),
        "ttft_ms": quantiles(merged(look.ttft_ms for look in recent)),
        "queue_wait_ms": quantiles(merged(look.queue_wait_ms for look in recent)),
        "output_tokens_s": round(sum(look.output_tokens / look.span_s for look in recent if look.span_s), 2),
        "tokens_per_step": None if tokens is None else round(tokens, 2),
    }


def stages_us(stages: Iterable[StagesUs], names: Iterable[str]) -> dict[str, float | None]:
    """Mean time of one layer of one micro-batch in each of these stages, over several actors."""
    actors = list(stages)
    means = {name: merged(us[name] for us in actors if name in us).mean for name in names}
    return {name: None if mean is None else round(mean, 2) for name, mean in means.items()}


def of_stages(stages: StagesUs) -> dict[str, Any]:
    """One actor's stages."""
    ratio = bubble(stages)
    return {"stages_us": stages_us([stages], stages), "bubble": None if ratio is None else round(ratio, 4)}
