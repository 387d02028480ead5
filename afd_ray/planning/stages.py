"""How long the stages of a layer last: work over what the hardware achieves, in microseconds."""

from afd_ray.engine.stage_costs import StageTimes
from afd_ray.planning.accelerators import SERVER, Accelerator, Achieved
from afd_ray.planning.costs import COMBINE_BYTES, DISPATCH_BYTES
from afd_ray.planning.shapes import WEIGHT_BYTES, AttentionLayers, FfnLayers


def attention_us(
    layer: AttentionLayers, hidden: int, gpu: Accelerator, rows: float, context: int, achieved: float, output_shards: int = 1
) -> float:
    """One accelerator and `rows` rows, each over `context` tokens: the cache, then the projections, whichever bounds them.

    Every accelerator holds all projections, but for the output's where `output_shards` of a server share it.
    """
    flops_s = gpu.flops if layer.cache_bytes == 1 else gpu.bf16_flops
    core_s = max(rows * layer.moved_bytes(context) / gpu.memory_bytes_s, rows * layer.flops(context) / flops_s)
    parameters = layer.input_parameters(hidden) + layer.output_parameters(hidden) / output_shards
    linear_s = max(parameters * WEIGHT_BYTES / gpu.memory_bytes_s, 2 * rows * parameters / gpu.flops)
    return (core_s + linear_s) / achieved * 1e6


def ffn_us(layer: FfnLayers, hidden: int, gpu: Accelerator, servers: int, rows: float, achieved: Achieved) -> float:
    """Servers that share a layer's experts, each tensor parallel, and a micro-batch of `rows` rows.

    All rows reach every server: each gathers them inside itself, reads its weights or computes, and scatters the sums.
    """
    ranks = servers * SERVER
    read_s = layer.parameters(hidden) * WEIGHT_BYTES / ranks / gpu.memory_bytes_s
    computed_s = 2 * rows * layer.active_parameters(hidden) / ranks / gpu.flops
    gathered = rows * hidden * (DISPATCH_BYTES + COMBINE_BYTES) * (SERVER - 1) / SERVER
    return (max(read_s, computed_s) / achieved.gemm.value + gathered / (gpu.link_bytes_s * achieved.link.value)) * 1e6


def wire_us(
    hidden: int, attention_bytes_s: float, ffn_bytes_s: float, attention_servers: int, ffn_servers: int, rows: float
) -> StageTimes:
    """The way there and back for `rows` rows of each attention accelerator; the halves' own times are zero.

    Accelerator i of a server talks to accelerator i of each server of the other half, so its rows leave once for each of them.
    """
    a_value = rows * hidden * max(ffn_servers / attention_bytes_s, attention_servers / ffn_bytes_s) * 1e6
    return StageTimes(0.0, DISPATCH_BYTES * a_value, 0.0, COMBINE_BYTES * a_value)
