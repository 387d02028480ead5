"""Epoch changes under faults: the live coordinator, seats and journals, with everything around them simulated.

`python -m afd_ray.simulation.protocol --seeds 1000` runs seeds until one violates what must always hold, and prints what happened in it.
"""

from afd_ray.simulation.protocol.cluster import Parts
from afd_ray.simulation.protocol.run import Report, run_seed, trace_seed
from afd_ray.simulation.protocol.world import Violation

__all__ = ["Parts", "Report", "Violation", "run_seed", "trace_seed"]
