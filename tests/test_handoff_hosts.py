"""The hand-off between hosts: a cut link is noticed though nothing tells of it, a bad one carries every message."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from afd_ray.handoff.mesh import LinkError, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind, Message
from benchmarks.testbed import CUT, PERFECT, Bed, Link, bed

HOSTS = ("one", "two")
WAIT_S = 30.0
SILENCE_S = 0.5
MESSAGES = 50


@pytest.fixture(scope="module")
def hosts(needs_testbed: None) -> Iterator[Bed]:
    with bed(HOSTS) as hosts:
        yield hosts


@pytest.fixture
def pair(hosts: Bed) -> Iterator[list[RingMesh]]:
    """A mesh of two ranks, each on a host; not by `auto`, which would find that they share this process' memory."""
    pair = joined(hosts)
    yield pair
    hosts.link(*HOSTS, PERFECT)
    for mesh in pair:
        mesh.close()


def joined(hosts: Bed) -> list[RingMesh]:
    def make(rank: int) -> RingMesh:
        host = hosts[HOSTS[rank]]
        return host.call(
            lambda: open_mesh(
                rank, 2, 1, secret=b"s", host=host.address, peers={1 - rank: 1 << 17}, kind="tcp", silence_s=SILENCE_S
            )
        )

    meshes = [make(0), make(1)]

    def connect(rank: int) -> None:
        endpoint = meshes[1 - rank].endpoint
        hosts[HOSTS[rank]].call(meshes[rank].connect, {1 - rank: endpoint}, WAIT_S)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(connect, (0, 1)))
    return meshes


def next_message(mesh: RingMesh) -> Message:
    """LinkError when the link is over."""
    while (message := mesh.receive()) is None:
        began_s = time.monotonic()
        mesh.wait(WAIT_S, True)
        assert time.monotonic() - began_s < WAIT_S, "nothing came and nothing broke"
    return message


def send(mesh: RingMesh, step: int = 0, rows: int = 1) -> None:
    mesh.send(1 - mesh.rank, Header(Kind.DISPATCH, epoch=1, source=mesh.rank, step=step), [torch.full((rows, 64), float(step))])


def test_who_has_sent_notices_a_cut_and_who_only_waits_too(hosts: Bed, pair: list[RingMesh]) -> None:
    hosts.link(*HOSTS, CUT)
    send(pair[0])
    for mesh in pair:
        with pytest.raises(LinkError, match="timed out") as noticed:
            next_message(mesh)
        assert noticed.value.peer == 1 - mesh.rank


def test_after_a_cut_they_can_meet_again(hosts: Bed, pair: list[RingMesh]) -> None:
    hosts.link(*HOSTS, CUT)
    send(pair[0])
    with pytest.raises(LinkError):
        next_message(pair[0])
    hosts.link(*HOSTS, PERFECT)
    again = joined(hosts)
    send(again[0], 7)
    assert next_message(again[1]).header.step == 7
    for mesh in again:
        mesh.close()


@pytest.mark.parametrize("link", [Link(loss=0.02), Link(delay_ms=5), Link(rate_mbit=50)], ids=["lossy", "slow", "narrow"])
def test_a_bad_link_carries_every_message_in_order(hosts: Bed, pair: list[RingMesh], link: Link) -> None:
    hosts.link(*HOSTS, link)
    for step in range(MESSAGES):
        send(pair[0], step, rows=1 + step)
        message = next_message(pair[1])
        assert message.header.step == step
        assert torch.equal(message.tensors[0], torch.full((1 + step, 64), float(step)))
        message.release()
