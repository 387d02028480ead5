"""Members of a group between devices that are not there: `host_device` in their place."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from torch import Tensor

from afd_ray.handoff.device.carrier import Carrier
from afd_ray.handoff.device.device_mesh import DeviceMesh
from afd_ray.handoff.device.ipc import IpcCarrier
from afd_ray.handoff.device.nccl import RECEIVER, Communicator, NcclCarrier
from afd_ray.handoff.device.streams import Stream
from afd_ray.handoff.mesh import LinkKind, open_mesh
from tests.host_device import HostDevice, HostStream

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


class Pipe:
    """A communicator of two processes: a socket between them, in shared memory's directory, that the stand-in's streams write and read."""

    def __init__(self, name: str, rank: int) -> None:
        self._aborted = threading.Event()
        address = f"/dev/shm/afd-ray-pipe-{name}"
        if rank == RECEIVER:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.settimeout(WAIT_S)
                listener.bind(address)
                listener.listen()
                self._socket = listener.accept()[0]
            os.unlink(address)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            until(lambda: self._socket.connect_ex(address) == 0)

    def send(self, data: Tensor, stream: Stream) -> None:
        assert isinstance(stream, HostStream)
        stream.run(lambda: self._try(lambda: self._socket.sendall(data.numpy().tobytes())))

    def receive(self, data: Tensor, stream: Stream) -> None:
        assert isinstance(stream, HostStream)
        stream.run(lambda: self._try(lambda: self._read(data)))

    def _read(self, data: Tensor) -> None:
        whole = memoryview(data.numpy())
        while len(whole) and (count := self._socket.recv_into(whole)):
            whole = whole[count:]
        while len(whole) and not self._aborted.wait(1e-3):
            """NCCL's kernel waits for ever when the other end is gone."""

    def _try(self, work: Callable[[], None]) -> None:
        with suppress(OSError):
            work()

    def abort(self) -> None:
        self._aborted.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Pipes:
    """Instead of NCCL."""

    def unique_id(self) -> bytes:
        return os.urandom(8)

    def communicator(self, unique_id: bytes, rank: int) -> Communicator:
        return Pipe(unique_id.hex(), rank)


def nccl(device: HostDevice, rank: int, peers: Mapping[int, int], places: int) -> Carrier:
    return NcclCarrier(device, rank, peers, places, Pipes())
