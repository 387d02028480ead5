"""Small simulated clusters, and policies that know no better, for tests."""

from collections.abc import Iterable, Iterator
from typing import Any

from afd_ray.autoscaling import Counts, Decision, Observation, Policy, State
from afd_ray.config import Config, parse_config
from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving import Arrival, LinearStages, Outcome, Scene, simulate

STAGES = LinearStages(CostLine(40, 16.0, 0.03), CostLine(160, 48.0), CostLine(20, 1.0))
"""One attention and one FFN rank decode 4 requests of 300 tokens in about 20 ms."""
LAYERS = 40
MOST = Counts(8, 8)


def small(start: Counts = Counts(1, 1), blocks: int = 2000, **sections: dict[str, Any]) -> Scene:  # noqa: B008
    """Up to 8A8F, new actors in 20 s, TPOT below 40 ms and first tokens within 1 s."""
    defaults: dict[str, dict[str, Any]] = {
        "attention": {"replicas": start.attention},
        "ffn": {"expert_parallel": start.ffn},
        "autoscaling": {
            "tpot_target_ms": 40.0,
            "ttft_target_ms": 1000.0,
            "max": MOST._asdict(),
            "options": {"shrink_after_s": 60.0},
        },
        "simulation": {"start_delay_s": 20.0, "load_s": 0.0},
    }
    raw = {name: defaults.get(name, {}) | sections.get(name, {}) for name in {*defaults, *sections}}
    config: Config = parse_config(raw)
    return Scene(config, STAGES, LAYERS, blocks)


def steady(rate: float, until_s: float, prompt: int = 40, output: int = 200, since_s: float = 0.0) -> Iterator[Arrival]:
    """Requests like clockwork."""
    count = int((until_s - since_s) * rate)
    return (Arrival(since_s + number / rate, prompt, output) for number in range(count))


def play(policy: Policy, arrivals: Iterable[Arrival], scene: Scene | None = None) -> Outcome:
    return simulate(scene or small(), iter(arrivals), policy)


def counts_at(outcome: Outcome, at_s: float) -> Counts:
    """What served then."""
    point = min(outcome.points, key=lambda point: abs(point.at_s - at_s))
    return Counts(point.attention, point.ffn)


def by_threshold(observation: Observation, state: State, now: float) -> Decision:
    """More when TPOT is over its target, fewer when it is well below; nothing when nothing was measured."""
    counts, tpot = observation.counts, observation.tpot_ms
    if tpot is None or observation.resize is not None:
        return Decision(counts, "nothing to go by")
    target = observation.goals.tpot_ms
    if tpot.p50 > target:
        return Decision(Counts(counts.attention + 1, counts.ffn + 1), "too slow")
    if tpot.p50 < 0.8 * target:
        return Decision(observation.goals.bound(Counts(counts.attention - 1, counts.ffn - 1)), "fast enough with fewer")
    return Decision(counts, "within bounds")


def by_completions(observation: Observation, state: State, now: float) -> Decision:
    """A rank for so many completions a second: a saturated cluster never looks busier than it is."""
    wanted = 1 + int(observation.completions_s / 2.0)
    return Decision(observation.goals.bound(Counts(wanted, wanted)), "by completion rate")
