"""A cluster whose roles are on different hosts: equal to the reference, whatever becomes of the links and hosts; no two epochs emit."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from afd_ray.models.checkpoint import Checkpoint, load_model
from benchmarks.testbed import CUT, PERFECT, Link
from tests.bed_cluster import ATTENTION, CLIENT, CPUS, DEADLINE_S, FFN, HEAD, LABELS, BedCluster, Streams, bed_cluster
from tests.live_server import until

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

PROMPTS = [[1 + i, 2, 3 + i] for i in range(8)]
MAX_TOKENS = 120


@pytest.fixture(scope="module")
def cluster(needs_testbed: None, tiny_directory: Path) -> Iterator[BedCluster]:
    with bed_cluster(tiny_directory) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(tiny_directory: Path) -> list[list[int]]:
    """What the one-process reference says."""
    reference = load_model(Checkpoint.open(tiny_directory))
    return [reference.generate_greedy(prompt, MAX_TOKENS) for prompt in PROMPTS]


@pytest.fixture
def streams(cluster: BedCluster) -> Streams:
    """Under way."""
    streams = cluster.stream(PROMPTS, MAX_TOKENS)
    streams.under_way()
    return streams


@pytest.fixture(autouse=True)
def whole_again(cluster: BedCluster) -> Iterator[None]:
    """After each test: ready, in the shape that was asked for, with nothing left over, and never two epochs at once."""
    yield
    until(lambda: cluster.status()["state"] == "ready" and len(cluster.running("attention")) == len(ATTENTION), DEADLINE_S)
    until(lambda: cluster.processes() == len(ATTENTION) + 1, DEADLINE_S)
    status = cluster.status()
    assert {cluster.host_of(actor) for actor in cluster.running("ffn")} == {FFN}
    assert len(status["placement_groups"]) == len(ATTENTION) + 1
    assert [actor["kv_used"] for actor in cluster.running("attention")] == [0] * len(ATTENTION)
    assert cluster.stale_epoch_tokens() == 0


def host_with(cluster: BedCluster, role: str) -> str:
    """Replacements go wherever there is room."""
    return cluster.host_of(cluster.running(role)[0])


def until_noticed(cluster: BedCluster, epoch: int) -> None:
    until(lambda: cluster.status()["epoch"] > epoch, DEADLINE_S)


def test_each_role_is_on_its_hosts_and_tokens_equal_the_reference(
    cluster: BedCluster, streams: Streams, expected: list[list[int]]
) -> None:
    assert {cluster.host_of(actor) for actor in cluster.running("attention")} == set(ATTENTION)
    assert streams.ended() == expected


def test_controller_and_ingress_are_where_no_other_host_takes_them_along(cluster: BedCluster) -> None:
    running = cluster.hosts[HEAD].run(["ps", "-ww", "-eo", "args"])
    assert "ray::Controller" in running
    assert "ray::ServeReplica:afd:ingress" in running


@pytest.mark.parametrize("rubbish", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 16], ids=["nothing", "http", "bytes"])
def test_a_stranger_at_any_port_changes_nothing(
    cluster: BedCluster, streams: Streams, expected: list[list[int]], rubbish: bytes
) -> None:
    def knock(address: str, port: int) -> None:
        with suppress(OSError), socket.create_connection((address, port), 1.0) as connection:
            connection.sendall(rubbish)
            connection.settimeout(0.2)
            connection.recv(1 << 16)

    listeners = cluster.listeners()
    # The kernel keeps 15 characters of a name, and Ray adds what an actor is doing.
    assert {program[:13] for _, _, program in listeners} >= {"gcs_server", "raylet", "ray::Attentio", "ray::FFNActor"}
    for address, port, _ in listeners:
        cluster.hosts[CLIENT].call(knock, address, port)
    assert streams.ended() == expected
    assert cluster.status()["state"] == "ready"


@pytest.mark.parametrize("link", [Link(delay_ms=5), Link(loss=0.02), Link(rate_mbit=20)], ids=["slow", "lossy", "narrow"])
def test_a_bad_link_between_the_roles_only_takes_longer(
    cluster: BedCluster, streams: Streams, expected: list[list[int]], link: Link
) -> None:
    for name in ATTENTION:
        cluster.hosts.link(name, FFN, link)
    tokens = streams.ended()
    for name in ATTENTION:
        cluster.hosts.link(name, FFN, PERFECT)
    assert tokens == expected


def test_a_cut_between_an_attention_host_and_the_ffn_host(
    cluster: BedCluster, streams: Streams, expected: list[list[int]]
) -> None:
    epoch = cluster.status()["epoch"]
    name = host_with(cluster, "attention")
    cluster.hosts.link(name, FFN, CUT)
    until_noticed(cluster, epoch)
    cluster.hosts.link(name, FFN, PERFECT)
    assert streams.ended() == expected


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_a_paused_process_is_done_without(cluster: BedCluster, streams: Streams, expected: list[list[int]], role: str) -> None:
    epoch = cluster.status()["epoch"]
    paused = cluster.running(role)[0]
    cluster.pause(paused)
    until_noticed(cluster, epoch)
    assert streams.ended() == expected
    assert paused["id"] not in [actor["id"] for actor in cluster.running(role)]


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_a_paused_host_that_wakes_up_in_a_later_epoch_says_nothing(
    cluster: BedCluster, streams: Streams, expected: list[list[int]], role: str
) -> None:
    epoch, name = cluster.status()["epoch"], host_with(cluster, role)
    cluster.hosts[name].pause()
    if name != FFN:
        until_noticed(cluster, epoch)
    else:
        until(lambda: cluster.status()["state"] != "ready", DEADLINE_S)
    cluster.hosts[name].wake()
    assert streams.ended() == expected


@pytest.mark.parametrize("role", ["attention", "ffn"])
def test_a_host_that_vanishes_is_done_without_and_taken_in_again(
    cluster: BedCluster, streams: Streams, expected: list[list[int]], role: str
) -> None:
    epoch, name = cluster.status()["epoch"], host_with(cluster, role)
    cluster.hosts.off(name)
    if name != FFN:
        until_noticed(cluster, epoch)
    cluster.hosts.on(name)
    cluster.ray.join(name, LABELS[name], CPUS)
    assert streams.ended() == expected
