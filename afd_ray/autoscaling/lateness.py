"""How near to the target ranks are to be counted, learned from the requests that were late.

What comes between two decisions, at the onset of a burst above all, makes some requests late; how many at one share of the target differs from day to day. So that share
moves with each request that ends: up a little when it was in time, down by much when it was late, in such a proportion that it stands still where as many are late as may be.
In the long run so many are, whatever the load does (as the level of adaptive conformal inference, Gibbs and Candes 2021, arXiv:2106.00170). Where the load has risen, and will
sooner fall than rise further, less has to be left free: that share is another one, learned by itself.
"""

from typing import Any

from afd_ray.autoscaling.values import Observation

START, RISEN_START = 0.95, 1.0
ATTAINMENT = 0.99
"""Share of the requests that is to be in time."""
SPENT = 0.65
"""Of those that may be late: the rest is for what has not come back into balance when somebody counts."""
GAIN = 0.001
"""By how much of the target a request that is late moves it. Ten at the onset of a burst are to be noticed; a hundred must not make up for the next ones at once."""
LEAST, MOST = 0.85, 1.0


def learned_margin(observation: Observation, memory: dict[str, Any], now: float, risen: bool = False) -> float:
    """The share of the TPOT target to count ranks for; `memory` keeps it. Options: `margin` to start with, `attainment` (1: it stays there)."""
    options = observation.goals.options
    start = options.get("margin", START)
    allowed = SPENT * max(0.0, 1 - options.get("attainment", ATTAINMENT))
    if not allowed:
        return start
    name = "margin"
    if risen:
        name, start = "margin_risen", max(start, RISEN_START)
    elapsed_s = max(0.0, now - memory.get("judged_at", now))
    step = GAIN * elapsed_s * (allowed * observation.completions_s - observation.late_s)
    margin = float(min(max(MOST, start), max(min(LEAST, start), memory.get(name, start) + step)))
    memory[name], memory["judged_at"] = margin, now
    return margin
