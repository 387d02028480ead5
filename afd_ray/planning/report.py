"""A plan as plain values: what `afd-ray plan --json` prints."""

from typing import Any

from afd_ray.engine.pipeline import enough_slots
from afd_ray.planning.accelerators import SERVER, Accelerator
from afd_ray.planning.deployment import bubble
from afd_ray.planning.search import Plan


def describe(plan: Plan) -> dict[str, Any]:
    """Times in the unit of their name, memory in GB for one accelerator; stages are those of the most common kind of layer."""
    d, reached, held = plan.deployment, plan.performance, plan.memory
    times = reached.times_us
    return {
        "instances": f"{d.attention_servers}A{d.ffn_servers}F",
        "attention": {"hardware": plan.attention, "servers": d.attention_servers, "ranks": SERVER * d.attention_servers},
        "ffn": {"hardware": plan.ffn, "servers": d.ffn_servers, "ranks": SERVER * d.ffn_servers},
        "gpus": d.gpus,
        "micro_batches": d.micro_batches,
        "rows_per_attention_rank": d.rows,
        "micro_batch": d.micro_batch,
        "batch": d.batch,
        "tpot_ms": round(reached.tpot_ms, 2),
        "tokens_per_s": round(reached.tokens_per_s),
        "tokens_per_gpu_s": round(reached.tokens_per_gpu_s, 1),
        "usd_per_million_tokens": round(reached.usd_per_million, 4),
        "usd_per_hour": round(d.usd_per_hour, 2),
        "binding": plan.bound,
        "memory_gb": {
            "attention_rank": _memory(held.attention, d.attention, weights=held.attention_weights, kv_cache=held.kv_cache),
            "ffn_rank": _memory(held.ffn_weights, d.ffn, weights=held.ffn_weights),
        },
        "stages_us": {stage: round(us, 1) for stage, us in times._asdict().items()},
        "bubble": round(bubble(times, d.micro_batches), 4),
        "micro_batches_without_bubble": enough_slots(times),
    }


def _memory(held: float, gpu: Accelerator, **parts: float) -> dict[str, float]:
    return {name: round(size / 1e9, 1) for name, size in ({"held": held, "of": gpu.memory_bytes} | parts).items()}
