"""Members of a group between devices that are not there: `host_device` in their place."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from afd_ray.handoff.device.carrier import Carrier
from afd_ray.handoff.device.device_mesh import DeviceMesh
from afd_ray.handoff.device.ipc import IpcCarrier
from afd_ray.handoff.mesh import LinkKind, open_mesh
from tests.host_device import HostDevice

CONTROL_BYTES = 1 << 16
PLACES = 4
WAIT_S = 20.0

MakeCarrier = Callable[[HostDevice, int, Mapping[int, int], int], Carrier]
"""Of a rank, with the longest frame from each peer, and how many places an edge has."""


def ipc(device: HostDevice, rank: int, peers: Mapping[int, int], places: int) -> Carrier:
    return IpcCarrier(device, peers, places)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came about"
        time.sleep(1e-3)


def member(
    rank: int,
    world_size: int,
    peers: Mapping[int, int],
    device: HostDevice,
    carrier: MakeCarrier = ipc,
    control: LinkKind = "auto",
    epoch: int = 0,
    places: int = PLACES,
) -> DeviceMesh:
    """Not connected yet; `peers`: the longest frame from each."""
    rings = dict.fromkeys(peers, CONTROL_BYTES)
    mesh = open_mesh(rank, world_size, epoch, secret=b"s", host="127.0.0.1", peers=rings, kind=control)
    return DeviceMesh(mesh, carrier(device, rank, peers, places), device)


@contextmanager
def connected(meshes: Sequence[DeviceMesh]) -> Iterator[Sequence[DeviceMesh]]:
    """In one process."""
    try:
        endpoints = {mesh.rank: mesh.endpoint for mesh in meshes}
        with ThreadPoolExecutor(len(meshes)) as pool:
            list(pool.map(lambda mesh: mesh.connect(endpoints, WAIT_S), meshes))
        yield meshes
    finally:
        for mesh in meshes:
            mesh.close()
