"""The load to come, from the load so far: level and trend, smoothed by time rather than by samples (Holt's linear method)."""

import math
from typing import Any

from afd_ray.autoscaling.values import State

LEVEL_S = 30.0
"""What is older counts less than a third."""
TREND_S = 120.0
MOST_GROWTH = 3.0


def forecast_growth(load: float, horizon_s: float, state: State, now: float) -> tuple[float, dict[str, Any]]:
    """How many times the present load is to be expected in `horizon_s` (at least 1, at most MOST_GROWTH), and what to remember."""
    memory: dict[str, Any] = dict(state)
    past = memory.get("forecast")
    if past is None:
        memory["forecast"] = {"level": load, "trend": 0.0, "at": now}
        return 1.0, memory
    elapsed_s = max(now - past["at"], 1e-9)
    expected = past["level"] + past["trend"] * elapsed_s
    level = expected + (load - expected) * (1 - math.exp(-elapsed_s / LEVEL_S))
    slope = (level - past["level"]) / elapsed_s
    trend = past["trend"] + (slope - past["trend"]) * (1 - math.exp(-elapsed_s / TREND_S))
    memory["forecast"] = {"level": level, "trend": trend, "at": now}
    if level <= 0:
        return 1.0, memory
    return min(MOST_GROWTH, max(1.0, (level + trend * horizon_s) / max(level, load, 1e-9))), memory
