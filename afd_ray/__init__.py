"""What is computed: the model, the engine, the hand-off. Nothing here imports Ray."""

from afd_ray.request import SamplingParams

__all__ = ["SamplingParams"]
