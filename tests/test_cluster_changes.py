"""A live cluster that changes under load: resized, rolled back, robbed of its actors and of its controller; no token is lost or changed."""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.cluster import Cluster, ClusterError
from actors.controller import NAMESPACE
from afd_ray.config import parse_config
from afd_ray.models.checkpoint import Checkpoint, load_model
from afd_ray.models.presets import PRESETS
from afd_ray.request import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_nodes")]

CLIENTS = 8
MAX_TOKENS = 60
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, top_p=0.9, frequency_penalty=0.2, seed=11, ignore_eos=True)
NAME = "afd-changing"
REPAIR_TIMEOUT_S = 90.0

# Up and down, in tensor and in expert parallelism.
RESIZES: list[dict[str, int]] = [
    {"attention": 2, "ffn": 2},
    {"ffn": 2, "ffn_tensor_parallel": 2},
    {"attention": 1, "ffn": 1, "ffn_tensor_parallel": 1},
]


@pytest.fixture(scope="module")
def cluster(tiny_directory: Path, two_nodes: None) -> Iterator[Cluster]:
    raw = {"model": {"path": str(tiny_directory)}, "attention": {"replicas": 1}, "failure": {"detect_timeout_s": 3.0}}
    with Cluster.start(parse_config(raw), name=NAME) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    vocab = PRESETS["step3-tiny"].vocab_size
    return [rng.choices(range(vocab), k=rng.randint(1, 120)) for _ in range(CLIENTS)]


@pytest.fixture(scope="module")
def expected(cluster: Cluster, tiny_directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Half greedy, as the reference has it; half sampled with a seed, as the undisturbed cluster has it."""
    reference = load_model(Checkpoint.open(tiny_directory))
    greedy = [reference.generate_greedy(prompt, MAX_TOKENS) for prompt in prompts[::2]]
    seeded = [list(answer.token_ids) for answer in cluster.generate(prompts[1::2], SEEDED)]
    return [tokens for pair in zip(greedy, seeded, strict=True) for tokens in pair]


class Load:
    """Clients that ask again and again, and compare every answer with the undisturbed one."""

    def __init__(self, cluster: Cluster, prompts: list[list[int]], expected: list[list[int]]) -> None:
        self.wrong: list[str] = []
        self.rounds = 0
        self._cluster, self._prompts, self._expected = cluster, prompts, expected
        self._over = threading.Event()
        self._round_over = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def await_rounds(self, more: int) -> None:
        """Until so many rounds have begun and ended from now on."""
        with self._round_over:
            enough = self.rounds + more + 1
            assert self._round_over.wait_for(lambda: self.rounds >= enough or bool(self.wrong), 120)

    def _run(self) -> None:
        params = [GREEDY if i % 2 == 0 else SEEDED for i in range(len(self._prompts))]
        while not self._over.is_set():
            try:
                answers = self._cluster.generate(self._prompts, params, timeout_s=120)
                differ = [i for i, answer in enumerate(answers) if list(answer.token_ids) != self._expected[i]]
                self.wrong += [f"round {self.rounds}: request {i} has other tokens" for i in differ]
            except (ClusterError, TimeoutError) as error:
                self.wrong.append(f"round {self.rounds}: {error}")
            with self._round_over:
                self.rounds += 1
                self._round_over.notify_all()


@contextmanager
def load(cluster: Cluster, prompts: list[list[int]], expected: list[list[int]]) -> Iterator[Load]:
    """Going on while the block runs; at its end every answer was right, and nothing is left of the requests."""
    running = Load(cluster, prompts, expected)
    try:
        yield running
        running.await_rounds(1)
    finally:
        running.stop()
    assert running.wrong == []
    assert cluster.check_integrity() == []


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


def test_resizes_under_load_change_no_token(cluster: Cluster, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with load(cluster, prompts, expected) as running:
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


def test_a_resize_that_cannot_be_is_rolled_back_and_harms_nobody(
    cluster: Cluster, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    before = reset(cluster, 1, 1)
    with load(cluster, prompts, expected):
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
    cluster: Cluster, prompts: list[list[int]], expected: list[list[int]], role: str, how: signal.Signals
) -> None:
    before = reset(cluster, 2, 2)
    victim = living(before)[role][-1]
    with load(cluster, prompts, expected):
        os.kill(victim["pid"], how)
        after = await_status(cluster, lambda now: now["state"] == "ready" and now["epoch"] > before["epoch"])
    assert {name: len(actors) for name, actors in living(after).items()} == {"attention": 2, "ffn": 2}
    (dead,) = [actor for actor in after[role] if actor["id"] == victim["id"]]
    assert dead["state"] == "dead"
    assert ("died" if how == signal.SIGKILL else "has not answered") in dead["reason"]


@pytest.mark.full
def test_the_controller_dies_and_its_successor_takes_over(
    cluster: Cluster, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    before = reset(cluster, 1, 2)
    ffn_pids = [actor["pid"] for actor in living(before)["ffn"]]
    with load(cluster, prompts, expected) as running:
        ray.kill(cluster.controller, no_restart=False)
        running.await_rounds(1)
        after = cluster.status()
        assert (after["epoch"], after["state"]) == (before["epoch"], "ready")
        assert [[actor["pid"] for actor in living(seen)["ffn"]] for seen in (before, after)] == 2 * [ffn_pids]
        assert cluster.scale(attention=2)["outcome"] == "committed"


def test_nothing_is_left_of_all_that(cluster: Cluster) -> None:
    status = reset(cluster, 1, 1)
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    uid = next(name for name in named if name.endswith(status["ffn"][0]["id"])).split("-")[1]
    assert sorted(name for name in named if name.startswith(f"afd-{uid}-")) == sorted(
        f"afd-{uid}-{status[role][0]['id']}" for role in ("attention", "ffn")
    )
    assert len(status["placement_groups"]) == 2
