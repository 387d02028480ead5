"""The group as its members see it."""

from afd_ray.handoff.message import LinkError, Mesh

__all__ = ["LinkError", "Mesh"]
