"""A live cluster that changes under load: resized, rolled back, robbed of its actors and of its controller; no token is lost or changed."""

import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from actors.cluster import Cluster, ClusterError
from actors.controller import NAMESPACE
from afd_ray.config import parse_config
from afd_ray.models.checkpoint import Checkpoint, load_model
from afd_ray.models.presets import PRESETS
from afd_ray.request import SamplingParams
from tests.cluster_load import Answers, load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_nodes")]

CLIENTS = 8
MAX_TOKENS = 60
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, top_p=0.9, frequency_penalty=0.2, seed=11, ignore_eos=True)
NAME = "afd-changing"
REPAIR_TIMEOUT_S = 90.0
REDUNDANT = 4
"""Of 8 experts, as far as a shape has room for copies."""

# Up and down, in tensor and in expert parallelism.
RESIZES: list[dict[str, int]] = [
    {"attention": 2, "ffn": 2},
    {"ffn": 2, "ffn_tensor_parallel": 2},
    {"attention": 1, "ffn": 1, "ffn_tensor_parallel": 1},
]


@pytest.fixture(scope="module")
def cluster(tiny_directory: Path, two_nodes: None) -> Iterator[Cluster]:
    raw = {
        "model": {"path": str(tiny_directory)},
        "attention": {"replicas": 1},
        "ffn": {"redundant_experts": REDUNDANT},
        "failure": {"detect_timeout_s": 3.0},
    }
    with Cluster.start(parse_config(raw), name=NAME) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def answers(cluster: Cluster, tiny_directory: Path) -> Answers:
    """Half greedy, as the reference has it; half sampled with a seed, as the undisturbed cluster has it."""
    rng = random.Random(3)
    vocab = PRESETS["step3-tiny"].vocab_size
    prompts = [rng.choices(range(vocab), k=rng.randint(1, 120)) for _ in range(CLIENTS)]
    reference = load_model(Checkpoint.open(tiny_directory))
    greedy = [reference.generate_greedy(prompt, MAX_TOKENS) for prompt in prompts[::2]]
    seeded = [list(answer.token_ids) for answer in cluster.generate(prompts[1::2], SEEDED)]
    tokens = [tokens for pair in zip(greedy, seeded, strict=True) for tokens in pair]
    return Answers(prompts, CLIENTS // 2 * [GREEDY, SEEDED], tokens)


def await_status(cluster: Cluster, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Each change of epoch or state is looked at until one is as wanted."""
    status = cluster.status()
    while not wanted(status):
        changed = cluster.controller.changed.remote(status["epoch"], status["state"])
        assert ray.wait([changed], timeout=REPAIR_TIMEOUT_S)[0], f"still {status['state']}: {status['reason']}"
        status = cluster.status()
    return status


def living(status: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {role: [actor for actor in status[role] if actor["state"] == "running"] for role in ("attention", "ffn")}


def reset(cluster: Cluster, attention: int, ffn: int, tensor_parallel: int = 1) -> dict[str, Any]:
    assert cluster.scale(attention, ffn, ffn_tensor_parallel=tensor_parallel)["outcome"] == "committed"
    return cluster.status()


def test_resizes_under_load_change_no_token(cluster: Cluster, answers: Answers) -> None:
    with load(cluster, answers) as running:
        for change in RESIZES:
            before = cluster.status()
            answer = cluster.scale(**change)
            assert (answer["outcome"], answer["reason"]) == ("committed", None)
            after = cluster.status()
            wanted = {role: change.get(role, len(before[role])) for role in ("attention", "ffn")}
            assert {role: len(actors) for role, actors in living(after).items()} == wanted
            assert after["epoch"] > before["epoch"]
            assert after["last_resize"] == answer
            running.await_rounds(1)
    assert len(cluster.status()["placement_groups"]) == 2


def test_collections_leave_out_what_actors_had_before_they_served(cluster: Cluster) -> None:
    """A full one over all objects of torch and Ray would stop a step loop for 0.1 to 0.4 s."""
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    actors = [ray.get_actor(name, namespace=NAMESPACE) for name in named]
    assert len(actors) >= 1 + len(living(cluster.status())["attention"]) + len(living(cluster.status())["ffn"])
    assert min(ray.get([actor.__ray_call__.remote(lambda _: gc.get_freeze_count()) for actor in actors])) > 50_000


def test_a_resize_that_cannot_be_is_rolled_back_and_harms_nobody(cluster: Cluster, answers: Answers) -> None:
    before = reset(cluster, 1, 1)
    with load(cluster, answers):
        answer = cluster.scale(attention=40)
        assert answer["outcome"] == "rolled_back"
        assert "needed: attention 39 CPUs in 39 group(s)" in answer["reason"]
        with pytest.raises(ClusterError, match="ffn must be a multiple of"):
            cluster.scale(ffn=3, ffn_tensor_parallel=2)
        with pytest.raises(ClusterError, match="at most the model's 8 experts, got 9"):
            cluster.scale(ffn=9)
        after = cluster.status()
        assert (after["epoch"], after["state"], after["last_resize"]) == (before["epoch"], "ready", answer)
        assert cluster.scale(attention=2)["outcome"] == "committed"


def test_requests_of_an_actor_that_leaves_bring_their_keys_and_values(cluster: Cluster) -> None:
    before = reset(cluster, 2, 1)
    rng = random.Random(4)
    prompts = [rng.choices(range(PRESETS["step3-tiny"].vocab_size), k=880) for _ in range(4)]
    params = [GREEDY if i % 2 == 0 else SEEDED for i in range(4)]
    undisturbed = [list(answer.token_ids) for answer in cluster.generate(prompts, params)]
    with load(cluster, Answers(prompts, params, undisturbed)):
        assert cluster.scale(attention=1)["outcome"] == "committed"
    after = cluster.status()["moved_in"]
    assert after["with_kv"] > before["moved_in"]["with_kv"]
    assert after["kv_bytes"] > before["moved_in"]["kv_bytes"]


def test_a_second_resize_meanwhile_is_refused_with_the_reason(cluster: Cluster) -> None:
    reset(cluster, 1, 1)
    first = cluster.controller.scale.remote(2)
    refused: list[str] = []
    while not ray.wait([first], timeout=0)[0]:
        try:
            cluster.scale(attention=3)
        except ClusterError as error:
            refused.append(str(error))
    assert any("a resize to 2 attention and 1 x 1 FFN ranks is in progress" in line for line in refused)
    assert ray.get(first)["outcome"] == "committed"


@pytest.mark.full  # the default suite kills in `test_chaos`
@pytest.mark.parametrize("role", ["ffn", "attention"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_actor_is_replaced_and_no_client_sees_it(
    cluster: Cluster, answers: Answers, role: str, how: signal.Signals
) -> None:
    before = reset(cluster, 2, 2)
    victim = living(before)[role][-1]
    with load(cluster, answers):
        os.kill(victim["pid"], how)
        after = await_status(cluster, lambda now: now["state"] == "ready" and now["epoch"] > before["epoch"])
    assert {name: len(actors) for name, actors in living(after).items()} == {"attention": 2, "ffn": 2}
    (dead,) = [actor for actor in after[role] if actor["id"] == victim["id"]]
    assert dead["state"] == "dead"
    assert ("died" if how == signal.SIGKILL else "has not answered") in dead["reason"]


@pytest.mark.full
def test_the_controller_dies_and_its_successor_takes_over(cluster: Cluster, answers: Answers) -> None:
    before = reset(cluster, 1, 2)
    ffn_pids = [actor["pid"] for actor in living(before)["ffn"]]
    with load(cluster, answers) as running:
        ray.kill(cluster.controller, no_restart=False)
        running.await_rounds(1)
        after = cluster.status()
        assert (after["epoch"], after["state"]) == (before["epoch"], "ready")
        assert [[actor["pid"] for actor in living(seen)["ffn"]] for seen in (before, after)] == 2 * [ffn_pids]
        assert cluster.scale(attention=2)["outcome"] == "committed"


def test_a_controller_that_dies_while_it_starts_actors_leaves_none_of_them(cluster: Cluster) -> None:
    before = reset(cluster, 1, 1)
    uid, known = uid_of(before), members(uid_of(before))
    pending = cluster.controller.scale.remote(3)
    while members(uid) == known:
        assert not ray.wait([pending], timeout=0)[0]
    ray.kill(cluster.controller, no_restart=False)
    until(lambda: answers_status(cluster))
    after = await_status(cluster, lambda now: now["state"] == "ready")
    assert after["epoch"] == before["epoch"]
    until(lambda: (members(uid), groups(uid)) == (known, len(after["placement_groups"])))


def test_nothing_is_left_of_all_that(cluster: Cluster) -> None:
    status = reset(cluster, 1, 1)
    uid = uid_of(status)
    assert members(uid) == {status[role][0]["id"] for role in ("attention", "ffn")}
    assert groups(uid) == len(status["placement_groups"]) == 2


def until(wanted: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + REPAIR_TIMEOUT_S
    while not wanted():
        assert time.monotonic() < deadline_s


def answers_status(cluster: Cluster) -> bool:
    """Whether a controller is there: not while it is being restarted."""
    try:
        cluster.status()
    except ray.exceptions.ActorUnavailableError:
        return False
    return True


def uid_of(status: dict[str, Any]) -> str:
    """What a cluster's names in Ray have in common."""
    group_id = status["placement_groups"][0]["id"]
    return str(placement_group_table()[group_id]["name"]).split("-")[1]


def members(uid: str) -> set[str]:
    """That Ray knows."""
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    return {name.removeprefix(f"afd-{uid}-") for name in named if name.startswith(f"afd-{uid}-")}


def groups(uid: str) -> int:
    """Placement groups that Ray holds."""
    tables = placement_group_table().values()
    return sum(table["name"].startswith(f"afd-{uid}-") and table["state"] != "REMOVED" for table in tables)
