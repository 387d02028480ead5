"""A live cluster on two nodes: equal to the one-process reference in every shape, placed and loaded by role."""

import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import ray

from actors.cluster import Cluster, ClusterError
from afd_ray.config import Config, ConfigError, LinkKind, parse_config
from afd_ray.membership.epoch import Dispatch
from afd_ray.membership.experts import place_experts
from afd_ray.models.checkpoint import Checkpoint, load_model
from afd_ray.models.presets import PRESETS
from afd_ray.request import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_nodes")]

MAX_TOKENS = 64
CONCURRENCY = 32
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)

Shape = tuple[int, int, int]
"""Attention ranks, tensor parallel, expert parallel."""

# 1A1F, 2A1F, 3A1F, 1A2F TP, 1A2F EP, 3A2F EP, 2A4F TP2xEP2
SHAPES: list[Shape] = [(2, 2, 2), (3, 1, 2), (1, 1, 2), (1, 2, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1)]
# Each shape and each micro-batch count at least once, in an order that starts and stops few actors.
COVER: list[tuple[Shape, int]] = [
    ((2, 2, 2), 3),
    ((3, 1, 2), 2),
    ((1, 1, 2), 1),
    ((1, 2, 1), 4),
    ((1, 1, 1), 3),
    ((2, 1, 1), 1),
    ((3, 1, 1), 2),
]
# With links, dispatch and place of the shared expert other than the default's, and copies of experts, for which there must be two instances.
OTHER_COVER: list[tuple[Shape, int]] = [((2, 2, 2), 2)]
FEW = 16
"""Of the prompts, for what is slow."""
OTHER_SHAPES = [shape for shape in SHAPES if shape[2] > 1]
OTHERS: list[tuple[Dispatch, LinkKind]] = [("routed", "tcp"), ("broadcast", "gloo")]
FULL = [(shape, count) for shape, count in product(SHAPES, (1, 2, 3, 4)) if (shape, count) not in COVER]


def config_for(directory: Path, **changes: dict[str, object]) -> Config:
    """Prefill in chunks of 96 rows, beside the decode rows of others."""
    raw: dict[str, dict[str, object]] = {
        "model": {"path": str(directory)},
        "attention": {"replicas": 2},
        "ffn": {"tensor_parallel": 2, "expert_parallel": 2},
        "pipeline": {"max_tokens_per_micro_batch": 96},
        "failure": {"detect_timeout_s": 10.0},
    }
    return parse_config(raw | changes)


@pytest.fixture(scope="module")
def cluster(tiny_directory: Path, two_nodes: None) -> Iterator[Cluster]:
    with Cluster.start(config_for(tiny_directory)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(2)
    vocab = PRESETS["step3-tiny"].vocab_size
    lengths = [1, 300, *(rng.randint(1, 300) for _ in range(62))]
    return [rng.choices(range(vocab), k=length) for length in lengths]


@pytest.fixture(scope="module")
def expected(tiny_directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    reference = load_model(Checkpoint.open(tiny_directory))
    return [reference.generate_greedy(prompt, MAX_TOKENS) for prompt in prompts]


@pytest.fixture(scope="module", params=OTHERS, ids=str)
def other_cluster(request: pytest.FixtureRequest, tiny_directory: Path, two_nodes: None) -> Iterator[Cluster]:
    dispatch, kind = request.param
    ffn = {"tensor_parallel": 2, "expert_parallel": 2, "dispatch": dispatch, "redundant_experts": 3}
    attention = {"replicas": 2, "shared_expert": dispatch == "routed"}
    config = config_for(tiny_directory, attention=attention, ffn=ffn, handoff={"kind": kind})
    with Cluster.start(config, name=f"afd-{dispatch}-{kind}") as cluster:
        yield cluster


def check_equal(cluster: Cluster, shape: Shape, count: int, prompts: list[list[int]], expected: list[list[int]]) -> None:
    expected = expected[: len(prompts)]
    attention, tensor, expert = shape
    cluster.reshape(attention, tensor_parallel=tensor, expert_parallel=expert, micro_batches=count)
    status = cluster.status()
    assert (len(status["attention"]), len(status["ffn"]), status["micro_batches"]) == (attention, tensor * expert, count)
    answers = cluster.generate(prompts, GREEDY, concurrency=CONCURRENCY)
    different = [i for i, (answer, want) in enumerate(zip(answers, expected, strict=True)) if list(answer.token_ids) != want]
    assert different == []
    assert cluster.check_integrity() == []


def test_roles_live_apart(cluster: Cluster) -> None:
    """As reserved at the start: a placement group for each attention actor and for each FFN instance."""
    status = cluster.status()
    assert status["state"] == "ready"
    attention, ffn = status["attention"], status["ffn"]
    assert {a["node"] for a in attention}.isdisjoint({f["node"] for f in ffn})
    assert len({actor["pid"] for actor in (*attention, *ffn)}) == 6
    assert sorted(expert for f in ffn for expert in f["experts"]) == sorted(2 * [*range(8)])
    of_instances = {(f["instance"], f["placement_group"]) for f in ffn}
    assert len(of_instances) == len({group for _, group in of_instances}) == 2
    groups = {group["id"]: group for group in status["placement_groups"]}
    assert len(groups) == 4
    for actor in (*attention, *ffn):
        group = groups[actor["placement_group"]]
        assert group["role"] == ("attention" if actor in attention else "ffn")
        assert (group["nodes"], group["state"]) == ([actor["node"]], "CREATED")


@pytest.mark.parametrize(("shape", "count"), COVER, ids=str)
def test_token_for_token_equal_to_the_reference(
    cluster: Cluster, prompts: list[list[int]], expected: list[list[int]], shape: Shape, count: int
) -> None:
    check_equal(cluster, shape, count, prompts, expected)


@pytest.mark.parametrize("other_cluster", [OTHERS[0], pytest.param(OTHERS[1], marks=pytest.mark.full)], ids=str, indirect=True)
@pytest.mark.parametrize(("shape", "count"), OTHER_COVER, ids=str)
def test_token_for_token_equal_to_the_reference_over_other_links_and_dispatch(
    other_cluster: Cluster, prompts: list[list[int]], expected: list[list[int]], shape: Shape, count: int
) -> None:
    check_equal(other_cluster, shape, count, prompts[:FEW], expected)


@pytest.mark.parametrize("other_cluster", OTHERS[:1], ids=str, indirect=True)
def test_rebalancing_places_experts_by_how_often_they_were_chosen(
    other_cluster: Cluster, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    other_cluster.reshape(1, expert_parallel=2)
    with pytest.raises(ClusterError, match="no expert was chosen in this epoch yet"):
        other_cluster.rebalance()
    other_cluster.generate(prompts[:8], GREEDY)
    loads = other_cluster.status()["expert_loads"]
    assert sum(loads) == 2 * 3 * sum(len(prompt) + MAX_TOKENS - 1 for prompt in prompts[:8])
    held = other_cluster.rebalance()
    assert held == [list(experts) for experts in place_experts(loads, 2, 3)]
    status = other_cluster.status()
    assert [actor["experts"] for actor in status["ffn"]] == held
    assert not any(status["expert_loads"])
    assert [list(answer.token_ids) for answer in other_cluster.generate(prompts[:8], GREEDY)] == expected[:8]


@pytest.mark.full
@pytest.mark.parametrize(
    ("shape", "count"), [case for case in product(OTHER_SHAPES, (1, 2, 3, 4)) if case not in OTHER_COVER], ids=str
)
def test_token_for_token_equal_to_the_reference_over_other_links_and_dispatch_in_the_full_grid(
    other_cluster: Cluster, prompts: list[list[int]], expected: list[list[int]], shape: Shape, count: int
) -> None:
    check_equal(other_cluster, shape, count, prompts, expected)


@pytest.mark.full
@pytest.mark.parametrize(("shape", "count"), FULL, ids=str)
def test_token_for_token_equal_to_the_reference_in_the_full_grid(
    cluster: Cluster, prompts: list[list[int]], expected: list[list[int]], shape: Shape, count: int
) -> None:
    check_equal(cluster, shape, count, prompts, expected)


def test_auto_gives_every_attention_actor_four_slots_and_the_choice(
    cluster: Cluster, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    cluster.reshape(2)
    answers = cluster.generate(prompts[:CONCURRENCY], GREEDY, concurrency=CONCURRENCY)
    assert [list(answer.token_ids) for answer in answers] == expected[:CONCURRENCY]
    status = cluster.status()
    assert status["micro_batches"] == 4
    assert all(1 <= actor["micro_batches"] <= 4 for actor in status["attention"])


def test_sampling_with_a_seed_does_not_depend_on_the_shape(cluster: Cluster, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)
    cluster.reshape(1, micro_batches=1)
    alone = [answer.token_ids for answer in cluster.generate(prompts[:8], params, concurrency=1)]
    cluster.reshape(2, expert_parallel=2, micro_batches=3)
    together = [answer.token_ids for answer in cluster.generate(prompts[:8], params)]
    assert together == alone


def test_status_tells_stage_times_and_latencies(cluster: Cluster, prompts: list[list[int]]) -> None:
    cluster.generate(prompts[:4], GREEDY)
    status = cluster.status()
    assert set(status["tpot_ms"]) == set(status["ttft_ms"]) == {"p50", "p95", "p99"}
    assert all(status["stages_us"][stage] > 0 for stage in ("attention", "ffn", "a2f", "f2a"))
    assert all(actor["running"] == actor["waiting"] == actor["kv_used"] == 0 for actor in status["attention"])


def test_the_decode_loop_makes_no_ray_call(cluster: Cluster, prompts: list[list[int]]) -> None:
    counting = cluster.controller.count_ray_calls.remote(16)
    while not ray.wait([counting], timeout=0)[0]:
        cluster.generate(prompts[:4], GREEDY)
    for actor, counts in ray.get(counting).items():
        assert counts["calls"] > 1000, actor
        assert counts["ray_calls"] == 0, actor


def test_a_trace_shows_every_stage_of_every_actor(cluster: Cluster, prompts: list[list[int]]) -> None:
    tracing = cluster.controller.trace.remote(8)
    while not ray.wait([tracing], timeout=0)[0]:
        cluster.generate(prompts, GREEDY)
    trace = ray.get(tracing)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    seen = {(event["pid"], event["cat"]) for event in events}
    actors = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    for pid, name in actors.items():
        assert {(pid, stage) for stage in (("attention", "f2a") if name.startswith("attention") else ("ffn", "a2f"))} <= seen
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    assert trace["otherData"]["overlap"] > 0


def test_bad_prompts_are_refused_in_one_line_and_harm_nobody(cluster: Cluster, prompts: list[list[int]]) -> None:
    for prompt, said in (
        ([], "at least 1 token"),
        ([1.5], "text or a list of token ids"),
        (None, "text or a list of token ids"),
        ([512], "from 0 to 511, got 512"),
        ([1] * 1024, "room for a token"),
        ("text", "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            cluster.generate([prompt])
    assert len(cluster.generate(prompts[:1], GREEDY)[0].token_ids) == MAX_TOKENS


def test_a_colocated_cluster_has_no_ffn_actors_and_equals_the_reference(
    tiny_directory: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with Cluster.start(config_for(tiny_directory, ffn={"colocated": True}), name="afd-colocated") as colocated:
        answers = colocated.generate(prompts[:FEW], GREEDY)
        assert [list(answer.token_ids) for answer in answers] == expected[:FEW]
        status = colocated.status()
        assert (len(status["attention"]), status["ffn"], status["micro_batches"]) == (2, [], 1)
        assert len({actor["node"] for actor in status["attention"]}) == 2
        assert {group["role"] for group in status["placement_groups"]} == {"attention"}
        assert all(status["stages_us"][stage] > 0 for stage in ("attention", "ffn"))
        assert colocated.check_integrity() == []
        colocated.reshape(1)
        assert (len(colocated.status()["attention"]), colocated.status()["ffn"]) == (1, [])
        assert [list(answer.token_ids) for answer in colocated.generate(prompts[:4], GREEDY)] == expected[:4]
        with pytest.raises(ClusterError, match="a colocated cluster has no FFN ranks"):
            colocated.reshape(1, expert_parallel=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": {"replicas": 40}}, r"needed: attention 40 CPUs in 40 group\(s\)"),
        pytest.param({"attention": {"labels": {"zone": "moon"}}}, "no node carries the labels zone=moon", marks=pytest.mark.full),
    ],
)
def test_a_bring_up_that_cannot_be_says_why_and_leaves_nothing(
    tiny_directory: Path, changes: dict[str, dict[str, object]], said: str
) -> None:
    before = ray.util.list_named_actors(all_namespaces=True)
    with pytest.raises(ClusterError, match=said):
        Cluster.start(config_for(tiny_directory, **changes), name="afd-impossible")
    assert ray.util.list_named_actors(all_namespaces=True) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ffn": {"expert_parallel": 9}}, r"ffn.expert_parallel must be at most the model's 8 experts, got 9"),
        ({"model": {"max_context": 4096}}, r"model.max_context: 4096 must be at most the model's 1024"),
    ],
)
def test_a_setting_that_the_model_cannot_have_is_refused_before_anything_starts(
    tiny_directory: Path, changes: dict[str, dict[str, object]], said: str
) -> None:
    raw = {"model": {"path": str(tiny_directory)} | changes.get("model", {})}
    with pytest.raises(ConfigError, match=said):
        Cluster.start(parse_config(changes | raw))


def test_every_token_has_its_time_in_order(cluster: Cluster) -> None:
    (answer,) = cluster.generate([[1, 2, 3]], GREEDY)
    assert len(answer.times_s) == MAX_TOKENS
    assert list(answer.times_s) == sorted(answer.times_s)
    assert answer.times_s[0] > 0
