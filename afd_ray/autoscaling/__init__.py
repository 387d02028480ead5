"""From what is observed of a cluster to how many attention and FFN ranks it should have.

A policy is a function `(observation, state, now) -> decision`. The live controller and the simulation call the same ones.
"""

from afd_ray.autoscaling.guard import Guard, decide
from afd_ray.autoscaling.loading import load_policy
from afd_ray.autoscaling.values import (
    Counts,
    Decision,
    Goals,
    Observation,
    Outcome,
    Override,
    Policy,
    Quantiles,
    Resize,
    Stages,
    State,
)

__all__ = [
    "Counts",
    "Decision",
    "Goals",
    "Guard",
    "Observation",
    "Outcome",
    "Override",
    "Policy",
    "Quantiles",
    "Resize",
    "Stages",
    "State",
    "decide",
    "load_policy",
]
