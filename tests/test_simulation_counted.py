"""A rank that counts, against the live scheduler round by round, and against itself without closed form."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving.cluster import Member
from afd_ray.simulation.serving.counted import CountedRank
from afd_ray.simulation.serving.in_rounds import RoundCluster
from afd_ray.simulation.serving.jobs import Job
from afd_ray.simulation.serving.rounds import PS_PER_S
from afd_ray.simulation.serving.scheduled import ScheduledRank
from afd_ray.simulation.serving.stages import LinearStages, Shape
from tests.test_simulation_rounds import Notebook

STAGES = LinearStages(CostLine(100, 2.0, 0.02), CostLine(150, 3.0), CostLine(30, 0.5))


class Case(NamedTuple):
    """What is played, and on how much."""

    requests: int = 60
    attention: int = 1
    micro_batches: int = 1
    blocks: int = 4000
    budget: int = 64
    max_running: int = 20
    longest_prompt: int = 200


class Played(NamedTuple):
    times: list[tuple[int, str, int]]
    rounds: int
    preemptions: int
    kv_used: list[float]
    advances: int


class SteppingRank(CountedRank):
    """Counts, but looks at every round."""

    def steady_from(self, number: int) -> int:
        return number + 1


def play(case: Case, kind: Callable[..., Any], seed: int = 0) -> Played:
    """Random requests, one after the other, until all are over; with an epoch that takes an attention rank away on the way."""
    random_, log = random.Random(seed), Notebook()

    def make(costs: CostLine | None) -> Any:
        return kind(blocks=case.blocks, block_size=4, budget=case.budget, max_running=case.max_running, costs=costs)

    cluster = RoundCluster(STAGES, 10, make, log, case.budget)
    cluster.use(case.micro_batches)
    members = [Member(f"attention-{rank}", 1 + rank / 10) for rank in range(case.attention)]
    cluster.form(members, [Member("ffn-0"), Member("ffn-1")], Shape(2))
    at_ps, advances, used = 0, 0, []
    for number in range(case.requests):
        at_ps += round(random_.expovariate(20) * PS_PER_S)
        advances += advance(cluster, at_ps)
        if number == case.requests // 2 and case.attention > 1:
            cluster.form(members[1:], cluster.ffn, Shape(2))
        used.append(cluster.ranks[-1].kv_used)
        prompt = random_.choice((2, random_.randint(2, case.longest_prompt)))
        cluster.submit(Job(number, at_ps, prompt, random_.randint(1, 80)))
    advances += advance(cluster, 10**6 * PS_PER_S)
    assert cluster.outstanding == 0
    return Played(log.times, log.rounds, sum(rank.preemptions for rank in cluster.ranks), used, advances)


def advance(cluster: RoundCluster, until_ps: int) -> int:
    count = 0
    while cluster.now_ps < until_ps and cluster.busy:
        cluster.advance(until_ps)
        count += 1
    cluster.now_ps = max(cluster.now_ps, until_ps)
    return count


CASES = {
    "plain": Case(),
    "long prompts in chunks": Case(longest_prompt=900, max_running=8),
    "KV for few": Case(blocks=150, max_running=8),
    "three ranks, one leaves": Case(attention=3, requests=90),
    "three micro-batches": Case(micro_batches=3, budget=512, longest_prompt=40),
    "KV too small": Case(blocks=60, longest_prompt=60),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_exactly_as_stepping_one_by_one(name: str, seed: int) -> None:
    counted, stepped = play(CASES[name], CountedRank, seed), play(CASES[name], SteppingRank, seed)
    assert counted.times == stepped.times
    assert counted.rounds == stepped.rounds
    assert counted.advances < stepped.advances


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_counting_is_exactly_as_the_live_scheduler(name: str, seed: int) -> None:
    """Every request's first and last token in the same picosecond, and as many KV blocks taken."""
    counted, scheduled = play(CASES[name], CountedRank, seed), play(CASES[name], ScheduledRank, seed)
    assert sorted(counted.times) == sorted(scheduled.times)
    assert counted.rounds == scheduled.rounds
    assert counted.preemptions == scheduled.preemptions
    assert (counted.preemptions > 0) == (name == "KV too small")
