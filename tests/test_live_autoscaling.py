"""A live cluster whose policy resizes it under load: no token is lost or changed, and the controller's death is not the end of it."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.cluster import Cluster
from afd_ray.config import parse_config
from afd_ray.models.checkpoint import Checkpoint, load_model
from afd_ray.models.presets import PRESETS
from afd_ray.request import SamplingParams
from tests.cluster_load import Answers, load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_nodes")]

CLIENTS, MAX_TOKENS = 6, 60
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
DEADLINE_S = 60.0


def config_for(directory: Path, policy: str, **scaling: Any) -> Any:
    """1A1F, paced so that its requests stay for a while."""
    return parse_config(
        {
            "model": {"path": str(directory)},
            "attention": {"replicas": 1, "pace": {"base_us": 3000}},
            "ffn": {"pace": {"base_us": 3000}},
            "failure": {"detect_timeout_s": 3.0},
            "autoscaling": {"policy": policy, "period_s": 0.3} | scaling,
        }
    )


@pytest.fixture(scope="module")
def answers(tiny_directory: Path) -> Answers:
    rng, reference = random.Random(5), load_model(Checkpoint.open(tiny_directory))
    prompts = [rng.choices(range(PRESETS["step3-tiny"].vocab_size), k=rng.randint(1, 60)) for _ in range(CLIENTS)]
    return Answers(prompts, CLIENTS * [GREEDY], [reference.generate_greedy(prompt, MAX_TOKENS) for prompt in prompts])


@pytest.fixture(scope="module")
def cluster(tiny_directory: Path, two_nodes: None) -> Iterator[Cluster]:
    with Cluster.start(config_for(tiny_directory, "tests.scaling_policies:by_requests"), name="afd-scaling") as cluster:
        yield cluster


def until(wanted: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not wanted():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def attention_ranks(cluster: Cluster) -> int:
    return sum(actor["state"] == "running" for actor in cluster.status()["attention"])


def test_load_makes_it_grow_and_rest_makes_it_shrink(cluster: Cluster, answers: Answers) -> None:
    with load(cluster, answers):
        until(lambda: attention_ranks(cluster) == 2)
    until(lambda: attention_ranks(cluster) == 1)
    done = [entry for entry in cluster.decisions() if entry["action"] != "hold"]
    assert [entry["action"] for entry in done[:2]] == ["resize", "committed"]
    assert done[0]["seen"]["requests"] > 2
    assert done[0]["wanted"] == {"attention": 2, "ffn": 1}


def test_a_controller_that_dies_leaves_its_decisions_to_the_next(cluster: Cluster) -> None:
    before = cluster.decisions()
    ray.kill(cluster.controller, no_restart=False)
    until(lambda: knows_more(cluster, before[-1]["number"]))
    after = cluster.decisions()
    assert [entry for entry in after if entry["number"] <= before[-1]["number"]][-len(before) :] == before
    numbers = [entry["number"] for entry in after]
    assert numbers == sorted(set(numbers))
    assert cluster.state()[1] == "ready"


def test_counts_set_by_hand_are_left_alone(cluster: Cluster) -> None:
    assert cluster.scale(attention=2)["outcome"] == "committed"
    last = cluster.decisions()[-1]["number"]
    until(lambda: len(cluster.decisions(last)) >= 3)
    status = cluster.status()
    assert attention_ranks(cluster) == 2
    assert status["autoscaling"]["override"]["counts"] == {"attention": 2, "ffn": 1}


@pytest.mark.full
def test_an_unsound_policy_does_not_hurt_serving(tiny_directory: Path, answers: Answers) -> None:
    config = config_for(tiny_directory, "tests.scaling_policies:unsound")
    with Cluster.start(config, name="afd-unsound") as cluster:
        with load(cluster, answers) as running:
            running.await_rounds(3)
            assert cluster.scale(attention=2)["outcome"] == "committed"
            until(lambda: len({entry["reason"] for entry in cluster.decisions()}) >= 4)
        assert {entry["wanted"]["attention"] for entry in cluster.decisions() if entry["action"] == "hold"} <= {1, 2}


def knows_more(cluster: Cluster, than: int) -> bool:
    """Whether a decision was made after that one; not while the controller is being restarted."""
    try:
        return bool(cluster.decisions(than))
    except ray.exceptions.RayActorError:
        return False
