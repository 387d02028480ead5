"""Runs of decode steps in closed form, against one round after the other."""

import random

import pytest

from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving.cluster import Member
from afd_ray.simulation.serving.counted import CountedRank
from afd_ray.simulation.serving.in_rounds import RoundCluster
from afd_ray.simulation.serving.jobs import Job
from afd_ray.simulation.serving.rounds import PS_PER_S, PassTimes
from afd_ray.simulation.serving.stages import LinearStages, Shape

LAYERS = 61


def drawn(seed: int) -> PassTimes:
    """Ranks whose attention grows at different speeds, so that which one is the slowest changes, and with it what bounds a round."""
    random_ = random.Random(seed)
    times = PassTimes(5)
    times.micro_batches = random_.randint(1, 4)
    times.ffn_ps = random_.randrange(2_000_000)
    for rank in range(5):
        times.set_rank(rank, 7, random_.randrange(3_000_000), random_.randrange(20_000), random_.randrange(1_000_000))
    return times


@pytest.mark.parametrize("seed", range(50))
def test_a_run_lasts_exactly_as_long_as_its_rounds(seed: int) -> None:
    times = drawn(seed)
    for rounds in (1, 2, 3, 17, 400):
        assert times.run(7, rounds) == sum(times.round(number).duration_ps for number in range(7, 7 + rounds))


@pytest.mark.parametrize("seed", range(50))
def test_a_run_goes_on_while_its_last_round_begins_before_the_limit(seed: int) -> None:
    times, random_ = drawn(seed), random.Random(seed)
    for _ in range(10):
        limit_ps, most = random_.randrange(1, 500_000_000), random_.randint(1, 300)
        rounds, passed_ps = 1, times.round(7).duration_ps
        while rounds < most and passed_ps < limit_ps:
            passed_ps += times.round(7 + rounds).duration_ps
            rounds += 1
        assert times.run_until(7, most, limit_ps)[:2] == (rounds, passed_ps)


class Notebook:
    """What a cluster tells."""

    def __init__(self) -> None:
        self.rounds = 0
        self.duration_ps = self.tokens = 0
        self.times: list[tuple[int, str, int]] = []

    def passed(self, rounds: int, duration_ps: int, attention_ps: int, ffn_ps: int) -> None:
        self.rounds += rounds
        self.duration_ps += duration_ps

    def decoded(self, tokens: int, gap_ps: float) -> None:
        self.tokens += tokens

    def first_token(self, job: Job, at_ps: int) -> None:
        self.times.append((job.number, "first", at_ps))

    def finished(self, job: Job, at_ps: int) -> None:
        self.times.append((job.number, "last", at_ps))


def step_us(stage_us: float, transfer_us: float, micro_batches: int) -> float:
    """Of a steady round of one attention rank with equal stages, whatever their rows."""
    stages = LinearStages(CostLine(stage_us), CostLine(stage_us), CostLine(transfer_us), "none")
    log = Notebook()

    def make(costs: CostLine | None) -> CountedRank:
        return CountedRank(blocks=1000, block_size=16, budget=512, max_running=64, costs=costs)

    cluster = RoundCluster(stages, LAYERS, make, log, 512)
    cluster.use(micro_batches)
    cluster.form([Member("attention-0")], [Member("ffn-0")], Shape(1))
    for number in range(12):
        cluster.submit(Job(number, 0, 8, 100))
    cluster.advance(10 * PS_PER_S)
    log.rounds = log.duration_ps = 0
    cluster.advance(10 * PS_PER_S)
    return log.duration_ps / log.rounds / 1e6


def test_three_micro_batches_of_equal_stages_take_49_8_ms() -> None:
    """Step-3, arXiv:2507.19427: 272 us for each of attention, wire and FFN, 61 layers; either half is busy all the time."""
    assert step_us(272, 272, micro_batches=3) / 1000 == pytest.approx(49.8, abs=0.05)
    assert step_us(272, 272, micro_batches=3) == pytest.approx(LAYERS * 3 * 272)


@pytest.mark.parametrize("micro_batches", [2, 3, 4])
@pytest.mark.parametrize("transfer", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_no_bubble_from_2_plus_transfer_over_stage_micro_batches_on(micro_batches: int, transfer: float) -> None:
    bubble = step_us(272, transfer * 272, micro_batches) - LAYERS * micro_batches * 272
    assert (bubble <= 1e-6 * LAYERS * 272) == (micro_batches >= 2 + transfer)
