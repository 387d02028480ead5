"""The part of `benchmarks.simulator` in which a policy resizes: the same sequence of resizes, each within a control period?

The simulator is told the stage times of a profile of one actor of each role, and from the live run how long a growth and a reduction took.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from actors.cluster import Cluster
from actors.profiling import Started, profile
from afd_ray.autoscaling import Counts, Decision, Observation, Policy, State, load_policy
from afd_ray.config import Config, load_config
from afd_ray.models.checkpoint import write_checkpoint
from afd_ray.models.presets import PRESETS, random_tensors
from afd_ray.simulation.serving import Arrival, Scene, simulate
from benchmarks._replay import Figures, replay, within

MODEL = replace(PRESETS["step3-tiny"], moe_layers=frozenset(range(4)), moe_num_experts=16, moe_top_k=1)
"""Each row has one expert, so that routed FFN instances divide the rows among them."""
PERIOD_S = 3.0
SETTINGS = (
    "attention.replicas=1",
    "attention.pace={base_us: 8000, per_context_token_us: 20}",
    "attention.kv_cache.num_blocks=384",
    "ffn.dispatch=routed",
    "ffn.pace={base_us: 300, per_row_us: 50}",
    "pipeline.micro_batches=2",
    "failure.detect_timeout_s=5",
    f"autoscaling.period_s={PERIOD_S}",
    "autoscaling.tpot_target_ms=96",
    "autoscaling.ttft_target_ms=10000",
    "autoscaling.max={attention: 3, ffn: 3}",
)


class Step(NamedTuple):
    """Requests like clockwork for some time."""

    seconds: float
    rate: float
    """Requests a second."""
    prompt: int


class Case(NamedTuple):
    """A policy, and loads that it is to follow."""

    options: str
    output: int
    """Tokens of each answer."""
    traces: dict[str, tuple[Step, ...]]

    def settings(self, policy: str) -> tuple[str, ...]:
        """As for `--set`."""
        return (*SETTINGS, f"autoscaling.policy={policy}", f"autoscaling.options={self.options}")


CASES = {
    "queue": Case(
        "{ongoing_per_attention: 8, grow_after_s: 3, shrink_after_s: 9}",
        30,
        {
            "rate": (Step(15, 1.4, 16), Step(25, 4.2, 16), Step(25, 1.4, 16)),
            "two steps": (Step(15, 1.4, 16), Step(20, 4.2, 16), Step(20, 7, 16), Step(30, 1.4, 16)),
            "one leap": (Step(15, 1.4, 16), Step(30, 6.5, 16), Step(30, 1.4, 16)),
            "context": (Step(15, 1.4, 16), Step(30, 2.2, 200), Step(30, 1.4, 16)),
        },
    ),
    "balance": Case(
        "{grow_after_s: 3, grow_cooldown_s: 3, shrink_after_s: 9, shrink_cooldown_s: 3, deviations: 0}",
        40,
        {
            "rate": (Step(15, 1, 16), Step(25, 3, 16), Step(25, 1, 16)),
            "two steps": (Step(15, 1, 16), Step(20, 3, 16), Step(20, 5, 16), Step(30, 1, 16)),
            "context": (Step(15, 1, 16), Step(25, 1, 150), Step(25, 1, 16)),
        },
    ),
}
"""Of loads whose steps are well apart: a few percent more or less of any stage would make the same resizes of them."""


class Move(NamedTuple):
    """A resize as it was decided."""

    at_s: float
    """Since the trace began."""
    before: Counts
    to: Counts

    def __str__(self) -> str:
        return f"{self.at_s:.1f} s {self.before} to {self.to}"


class Scaled(NamedTuple):
    """One trace under a policy, live and simulated."""

    policy: str
    trace: str
    live: Figures
    simulated: Figures
    live_moves: tuple[Move, ...]
    simulated_moves: tuple[Move, ...]

    @property
    def same(self) -> bool:
        """Whether the sequence is."""
        return [move[1:] for move in self.live_moves] == [move[1:] for move in self.simulated_moves]

    @property
    def apart_s(self) -> float:
        """The most that a resize was decided earlier or later than its like, to a tenth: live decisions come some milliseconds late."""
        pairs = zip(self.live_moves, self.simulated_moves, strict=False)
        return max((round(abs(one.at_s - other.at_s), 1) for one, other in pairs), default=0.0)

    @property
    def alike(self) -> bool:
        """Whether each resize was decided within a period of its like."""
        return self.same and self.apart_s <= PERIOD_S

    @property
    def holds(self) -> bool:
        return self.alike and within(self.simulated, self.live)


class Observed(NamedTuple):
    """What the simulator is told of a live run, seconds."""

    growth_s: float
    reduction_s: float


def run_cases(quick: bool) -> Iterator[Scaled]:
    """Each trace on a cluster of its own, so that nothing is remembered from the one before."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), MODEL, random_tensors(MODEL, seed=0))
        model = f"model.path={directory}"
        stages = Path(directory) / "stages.json"
        with Cluster.start(load_config("demo", [model, *SETTINGS])) as cluster:
            stages.write_text(json.dumps(profile(Started(cluster), {"of": "resizes"}, rounds=1)))
        for policy, case in CASES.items():
            config = load_config("demo", [model, *case.settings(policy)])
            for trace, steps in islice(case.traces.items(), 1 if quick else None):
                arrivals = list(drawn(steps, case.output))
                live, moves, observed = serve(config, arrivals)
                there, simulated_moves = simulated(config, stages, arrivals, observed)
                yield Scaled(policy, trace, live, there, tuple(moves), tuple(simulated_moves))


def drawn(steps: Sequence[Step], output: int) -> Iterator[Arrival]:
    """A request as each step begins, and then in even distances."""
    for start_s, step in zip(accumulate((step.seconds for step in steps), initial=0.0), steps, strict=False):
        count = round(step.seconds * step.rate)
        yield from (Arrival(start_s + number / step.rate, step.prompt, output) for number in range(count))


# --- live --------------------------------------------------------------------------------------------------------------------


def serve(config: Config, arrivals: Sequence[Arrival]) -> tuple[Figures, list[Move], Observed]:
    """The trace begins with a look of the autoscaler's, as the simulator's does."""
    with Cluster.start(config) as cluster:
        idle = _next_look(cluster)
        seen = replay(cluster, arrivals)
        entries = cluster.decisions(idle["number"])
    moves, lasted = moves_of(entries, idle["at_s"])
    until_s = arrivals[-1].at_s
    return seen, [move for move in moves if move.at_s < until_s], _observed(moves, lasted)


def _next_look(cluster: Cluster) -> dict[str, Any]:
    """The decision that comes next."""
    known = max((entry["number"] for entry in cluster.decisions()), default=0)
    while not (entries := cluster.decisions(known)):
        time.sleep(0.02)
    return entries[0]


def moves_of(entries: Sequence[dict[str, Any]], began_s: float) -> tuple[list[Move], list[float]]:
    """The resizes that committed, and how long each took."""
    moves, lasted, asked = [], [], None
    for entry in entries:
        if entry["action"] in ("resize", "rolled_back"):
            asked = entry if entry["action"] == "resize" else None
        elif entry["action"] == "committed" and asked is not None:
            moves.append(Move(asked["at_s"] - began_s, Counts(**asked["before"]), Counts(**asked["wanted"])))
            lasted.append(entry["at_s"] - asked["at_s"])
    return moves, lasted


def _observed(moves: Sequence[Move], lasted: Sequence[float]) -> Observed:
    grown = [took_s for move, took_s in zip(moves, lasted, strict=True) if sum(move.to) > sum(move.before)]
    shrunk = [took_s for move, took_s in zip(moves, lasted, strict=True) if sum(move.to) < sum(move.before)]
    reduction_s = fmean(shrunk) if shrunk else 0.0
    return Observed(max(reduction_s, fmean(grown)) if grown else reduction_s, reduction_s)


# --- simulated ---------------------------------------------------------------------------------------------------------------


def simulated(config: Config, stages: Path, arrivals: Sequence[Arrival], observed: Observed) -> tuple[Figures, list[Move]]:
    """The same policy on the same trace."""
    told = {
        "detail": "layers",
        "profile": str(stages),
        "start_delay_s": observed.growth_s - observed.reduction_s,
        "load_s": 0.0,
        "connect_s": observed.reduction_s,
    }
    settings = type(config.simulation).model_validate(config.simulation.model_dump() | told)
    moves: list[Move] = []
    scene = Scene.of(config.model_copy(update={"simulation": settings}))
    outcome = simulate(scene, iter(arrivals), noting(load_policy(config.autoscaling.policy), moves))
    until_s = arrivals[-1].at_s
    return Figures.of(outcome, arrivals[0].at_s), [move for move in moves if move.at_s < until_s]


def noting(policy: Policy, moves: list[Move]) -> Policy:
    """The policy, with what it decides to resize put down."""

    def decide(observation: Observation, state: State, now: float) -> Decision:
        decision = policy(observation, state, now)
        if decision.counts != observation.counts:
            moves.append(Move(now, observation.counts, decision.counts))
        return decision

    return decide
