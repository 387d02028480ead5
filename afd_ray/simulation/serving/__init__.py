"""Serving under a trace and an autoscaling policy: the live scheduler's rules, the pipeline's arithmetic, the phases of a resize, on a virtual clock."""

from afd_ray.simulation.serving.outcome import Outcome
from afd_ray.simulation.serving.run import Simulation, simulate
from afd_ray.simulation.serving.scene import Scene
from afd_ray.simulation.serving.stages import LinearStages, Profile
from afd_ray.simulation.serving.trace_files import read_trace
from afd_ray.simulation.serving.traces import KINDS, Arrival, Synthetic, draw, parse_synthetic

__all__ = [
    "KINDS",
    "Arrival",
    "LinearStages",
    "Outcome",
    "Profile",
    "Scene",
    "Simulation",
    "Synthetic",
    "draw",
    "parse_synthetic",
    "read_trace",
    "simulate",
]
