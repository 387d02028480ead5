"""Clusters simulated layer by layer: against the pipeline's arithmetic, and whole runs with resizes and losses."""

import json
import random
from pathlib import Path
from statistics import fmean, stdev

import pytest

from afd_ray.autoscaling import Counts
from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving import Arrival, Profile
from afd_ray.simulation.serving.cluster import Member
from afd_ray.simulation.serving.in_layers import LayerCluster
from afd_ray.simulation.serving.jobs import Job
from afd_ray.simulation.serving.rounds import PS_PER_S
from afd_ray.simulation.serving.scheduled import SlotRank
from afd_ray.simulation.serving.stages import Company, LinearStages, Shape, StageModel
from tests.serving_scenes import by_threshold, play, small, steady
from tests.test_simulation_rounds import Notebook

LAYERS = 12
LAYERWISE = {"detail": "layers", "start_delay_s": 20.0}


class Tokens(Notebook):
    """When tokens came, too."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps_us: list[float] = []

    def decoded(self, tokens: int, gap_ps: float) -> None:
        super().decoded(tokens, gap_ps)
        self.gaps_us += [gap_ps / 1e6] * tokens


def cluster_of(
    stages: StageModel, log: Notebook, attention: int = 1, slots: int = 1, layers: int = LAYERS, seed: int = 0
) -> LayerCluster:
    def make() -> SlotRank:
        return SlotRank(blocks=1000, block_size=16, budget=512, max_running=64)

    cluster = LayerCluster(stages, layers, make, log, 512, slots, adaptive=False, seed=seed)
    cluster.form([Member(f"attention-{rank}") for rank in range(attention)], [Member("ffn-0")], Shape(1))
    return cluster


def run(cluster: LayerCluster) -> None:
    while cluster.busy:
        cluster.advance(cluster.now_ps + 10 * PS_PER_S)


def gap_us(stage_us: float, transfer_us: float, slots: int) -> float:
    """From token to token in the middle of a run with a sequence in each slot, stages of equal length."""
    log = Tokens()
    cluster = cluster_of(LinearStages(CostLine(stage_us), CostLine(stage_us), CostLine(transfer_us), "none"), log, slots=slots)
    for number in range(slots):
        cluster.submit(Job(number, 0, 1, 60))
    run(cluster)
    middle = log.gaps_us[20 * slots : 40 * slots]
    return sum(middle) / len(middle)


# --- against arithmetic ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("transfer", [0.0, 0.5, 1.0, 2.0])
def test_slots_that_are_alike_overlap_as_the_pipelines_arithmetic_says(slots: int, transfer: float) -> None:
    expected = LAYERS * 272 * max(slots, 2 + transfer)
    assert gap_us(272, transfer * 272, slots) == pytest.approx(expected, rel=0.01)


def test_a_rank_waits_for_the_slowest_of_its_wave() -> None:
    """One sequence each; the long context of one holds up the other."""
    log = Tokens()
    cluster = cluster_of(LinearStages(CostLine(100, 0, 1.0), CostLine(50), scaling="none"), log, attention=2)
    for prompt in (1, 400):
        cluster.submit(Job(prompt, 0, prompt, 40))
    run(cluster)
    assert min(log.gaps_us[10:40]) >= LAYERS * (100 + 400 + 50)


def test_layers_last_as_a_profile_says_each_of_them_does(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    attention = {"rows": 1, "context_tokens": 10, "us": 100.0, "by_layer": [3.0, 0.5, 0.5]}
    path.write_text(json.dumps({"attention": [attention], "ffn": [{"rows": 1, "us": 50.0, "by_layer": [0.2, 1.8]}]}))
    log = Tokens()
    cluster = cluster_of(Profile.read(path), log, layers=2)
    cluster.submit(Job(0, 0, 1, 2))
    run(cluster)
    assert log.gaps_us == [100 * (3.0 + 0.5 + 0.5) + 50 * (0.2 + 1.8)]
    assert Profile.read(path).attention_by_layer(1, 3) == (1.0, 1.0, 1.0, 0.0), "of another number of layers"


def test_a_rank_alone_lasts_as_long_as_one_alone_did(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    points = {
        "attention": [{"rows": 1, "context_tokens": 0, "us": 200.0}],
        "ffn": [{"rows": 1, "us": 100.0, "ranks": 1}],
        "transfer": [{"bytes": 10, "us": 40.0}],
    }
    alone = {name: [point | {"us": point["us"] / 2}] for name, (point,) in points.items()}
    path.write_text(json.dumps(points | {"bytes_per_row": 10, "alone": {"ranks": 3, **alone}}))
    profile = Profile.read(path)
    assert profile.company(1) == Company(0.5, 0.5, 0.5)
    assert profile.company(2) == Company(0.75, 0.75, 0.75)
    assert profile.company(3) == profile.company(9) == Company()
    log = Tokens()
    cluster = cluster_of(profile, log, attention=3)
    cluster.submit(Job(0, 0, 1, 2))
    run(cluster)
    assert log.gaps_us == [LAYERS * 170.0]


def uneven(path: Path, spread: float) -> Profile:
    points = {"rows": 1, "us": 100.0, "spread": spread}
    path.write_text(json.dumps({"attention": [points | {"context_tokens": 0}], "ffn": [points]}))
    return Profile.read(path)


def gaps_us(profile: Profile, attention: int, seed: int = 0) -> list[float]:
    """Of a sequence on each rank."""
    log = Tokens()
    cluster = cluster_of(profile, log, attention=attention, seed=seed)
    for number in range(attention):
        cluster.submit(Job(number, 0, 1, 400))
    run(cluster)
    return log.gaps_us


def test_layers_that_last_unevenly_keep_their_mean_and_hold_up_waves(tmp_path: Path) -> None:
    profile, even = uneven(tmp_path / "profile.json", 0.3), LAYERS * 200.0
    alone, two = (gaps_us(profile, attention) for attention in (1, 2))
    assert fmean(alone) == pytest.approx(even, rel=0.02)
    assert stdev(alone) > 0.05 * even
    assert fmean(two) == pytest.approx(LAYERS * (130 + 100), rel=0.02), "the longer of two layers lasts 1.3 times the mean"
    assert alone == gaps_us(profile, 1) != gaps_us(profile, 1, seed=1)
    assert set(gaps_us(uneven(tmp_path / "even.json", 0.0), 1)) == {even}


# --- whole runs --------------------------------------------------------------------------------------------------------------------


def drawn(count: int = 60) -> list[Arrival]:
    random_ = random.Random(5)
    times = sorted(random_.uniform(0, 60) for _ in range(count))
    return [Arrival(at_s, random_.randint(1, 200), random_.randint(1, 60)) for at_s in times]


@pytest.mark.parametrize("micro_batches", [2, "auto"])
def test_nothing_is_lost_in_resizes_and_losses(micro_batches: int | str) -> None:
    failures = [{"at_s": 25.0, "role": "attention"}, {"at_s": 40.0, "role": "ffn"}]
    scene = small(Counts(3, 2), simulation=LAYERWISE | {"failures": failures}, pipeline={"micro_batches": micro_batches})
    arrivals = drawn()
    outcome = play(by_threshold, arrivals, scene)
    assert {change.outcome for change in outcome.changes} >= {"lost", "committed"}
    assert outcome.unfinished == 0
    assert outcome.tally.completions == len(arrivals)
    assert outcome.tally.tokens == sum(arrival.output for arrival in arrivals)


def test_the_same_arguments_give_the_same_run() -> None:
    def once() -> object:
        outcome = play(by_threshold, drawn(), small(Counts(2, 2), simulation=LAYERWISE))
        return outcome.summary(), outcome.changes, outcome.points

    assert once() == once()


def test_by_layers_and_by_rounds_agree_where_slots_are_alike() -> None:
    """Requests that keep one rank's two slots evenly filled."""
    tpots = []
    for detail in ("rounds", "layers"):
        scene = small(simulation={"detail": detail, "start_delay_s": 20.0}, pipeline={"micro_batches": 2})
        outcome = play(lambda seen, state, now: seen.counts, steady(1.0, 60), scene)  # type: ignore[arg-type, return-value]
        tpots.append(outcome.summary()["tpot_ms"]["p50"])
    assert tpots[1] == pytest.approx(tpots[0], rel=0.1)
