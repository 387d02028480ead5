"""A plan as the configuration that runs it."""

import math
from typing import Any

import yaml

from afd_ray.planning.accelerators import SERVER
from afd_ray.planning.search import Plan
from afd_ray.planning.shapes import Linear, ModelShape

BLOCK_TOKENS = 64
LEAST_STEP_TOKENS = 512
"""Prompts fill a micro-batch up to here when fewer rows decode."""
SERVED = "Step-3"


def configuration(plan: Plan, checkpoint: str, tpot_ms: float) -> dict[str, Any]:
    """Sections and keys of `afd_ray.config.Config`; a rank for each accelerator, a tensor-parallel instance for each FFN server."""
    d = plan.deployment
    requests = d.micro_batches * d.rows
    pools = {"attention": SERVER * d.attention_servers, "ffn": SERVER * d.ffn_servers}
    return {
        "model": {"path": checkpoint},
        "attention": {
            "replicas": pools["attention"],
            "num_gpus": 1,
            "labels": {"ray.io/accelerator-type": d.attention.ray_type},
            "projection_dtype": "fp8",
            "kv_cache": {
                "block_size": BLOCK_TOKENS,
                "num_blocks": requests * math.ceil(d.context / BLOCK_TOKENS),
                "dtype": _cache_dtype(d.shape),
            },
        },
        "ffn": {
            "tensor_parallel": SERVER,
            "expert_parallel": d.ffn_servers,
            "num_gpus": 1,
            "labels": {"ray.io/accelerator-type": d.ffn.ray_type},
            "expert_dtype": "fp8",
            "dense_dtype": "fp8",
        },
        "pipeline": {
            "micro_batches": d.micro_batches,
            "max_tokens_per_micro_batch": max(LEAST_STEP_TOKENS, d.rows),
            "max_running_requests": requests,
        },
        "handoff": {"wire_dtype": "fp8"},
        "placement": {"attention": "PACK", "ffn": "PACK", "separate_nodes": True},
        "autoscaling": {"tpot_target_ms": tpot_ms, "max": pools},
    }


def _cache_dtype(shape: ModelShape) -> str:
    """What the plan reckons with."""
    narrow = all(group.cache_bytes == 1 for group in shape.attention if not isinstance(group, Linear))
    return "fp8" if narrow else "bfloat16"


def configuration_text(plan: Plan, checkpoint: str, tpot_ms: float) -> str:
    """YAML for `afd-ray serve`, with what was planned in comments."""
    d, reached = plan.deployment, plan.performance
    head = [
        f"{d.shape.name}, {d.attention_servers}A{d.ffn_servers}F in servers of {SERVER}: "
        f"attention on {d.attention.name}, FFN on {d.ffn.name}.",
        f"Planned: {d.batch:,} requests of {d.context:,} tokens at {reached.tpot_ms:.1f} ms for each token, "
        f"{reached.tokens_per_gpu_s:,.0f} tokens/s for each GPU, {reached.usd_per_million:.3f} USD for a million tokens.",
    ]
    if d.shape.name != SERVED:
        head.append(f"afd-ray serves the {SERVED} architecture: this is the layout alone.")
    body: str = yaml.safe_dump(configuration(plan, checkpoint, tpot_ms), sort_keys=False)
    return "".join(f"# {line}\n" for line in head) + body
