"""Which device an actor computes on: the one place that may load the GPU's part, for without a GPU Triton need not be installed."""

import importlib.util

import torch

from afd_ray.engine.compute import Compute, HostCompute


def compute_for(
    role: str,
    num_gpus: float,
    *,
    quantise_experts: bool = False,
    quantise_rows: bool = False,
    graphs: bool = False,
    stays: bool = False,
) -> Compute:
    """What `num_gpus` of that role's configuration asks for; raises RuntimeError in one line where this actor cannot have it.

    `quantise_experts`, `quantise_rows`, `stays`: as `GPUCompute` takes them. `graphs`: steps that decode are captured. A CPU needs none of these.
    """
    if not num_gpus:
        return HostCompute()
    asked = f"{role}.num_gpus: {num_gpus:g}"
    if not torch.cuda.is_available():
        raise RuntimeError(f"{asked} needs a CUDA GPU, and torch {torch.__version__} finds none in this actor's process")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{asked} needs Triton, which is not installed here (extras cuda12 and cuda13 have it)")
    from afd_ray.engine.gpu.compute import GPUCompute

    return GPUCompute.of_first_gpu(
        num_gpus, quantise_experts=quantise_experts, quantise_rows=quantise_rows, graphs=graphs, stays=stays
    )
