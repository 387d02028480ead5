"""Two real processes on one edge: no wake-up is lost, and a killed peer is noticed."""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from afd_ray.handoff.mesh import Endpoint, LinkKind, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind, LinkError, Message

KINDS: tuple[LinkKind, ...] = ("shm", "tcp", "gloo")
WAIT_S = 20.0
Peer = tuple[Connection, multiprocessing.process.BaseProcess]


def join(rank: int, pipe: Connection, kind: LinkKind, spin_us: float) -> RingMesh:
    mesh = open_mesh(rank, 2, 0, secret=b"s", host="127.0.0.1", peers={1 - rank: 1 << 14}, kind=kind, spin_us=spin_us)
    pipe.send(mesh.endpoint.to_dict())
    mesh.connect({1 - rank: Endpoint.from_dict(pipe.recv())}, timeout_s=WAIT_S)
    return mesh


def next_message(mesh: RingMesh) -> Message:
    while (message := mesh.receive()) is None:
        began_s = time.monotonic()
        mesh.wait(WAIT_S, under_way=True)
        assert time.monotonic() - began_s < WAIT_S, "nothing woke the reader"
    return message


def echo(pipe: Connection) -> None:
    """Join the groups that are ordered, and echo in the last one until its peer leaves."""
    while orders := pipe.recv():
        meshes = [join(1, pipe, *order) for order in orders]
        try:
            while True:
                message = next_message(meshes[-1])
                meshes[-1].send(0, Header(Kind.PARTIAL, epoch=0, source=1, step=message.header.step), message.tensors)
                message.release()
        except LinkError:
            for mesh in meshes:
                mesh.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=echo, args=(there,))
    process.start()
    yield here, process
    if process.is_alive():
        here.send([])
    process.join(WAIT_S)
    process.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spin_us", [0.0, 20.0])
def test_no_wake_up_is_lost(peer: Peer, kind: LinkKind, spin_us: float) -> None:
    pipe, _ = peer
    pipe.send([(kind, spin_us)])
    mesh = join(0, pipe, kind, spin_us)
    payload = torch.zeros(33, dtype=torch.int64)
    for step in range(600):
        mesh.send(1, Header(Kind.DISPATCH, epoch=0, source=0, step=step), [payload + step])
        message = next_message(mesh)
        assert message.header.step == step
        assert torch.equal(message.tensors[0], payload + step)
        message.release()
    mesh.close()


def test_a_killed_peer_is_named(peer: Peer) -> None:
    pipe, process = peer
    pipe.send([(kind, 0.0) for kind in KINDS])
    meshes = [join(0, pipe, kind, 0.0) for kind in KINDS]
    process.kill()
    for mesh in meshes:
        with pytest.raises(LinkError, match="edge to rank 1: closed by the peer"):
            next_message(mesh)
        mesh.close()
