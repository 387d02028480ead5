"""Ways for two processes to hand bytes to each other and back: the links, and the bare mechanism that each stands on."""

import mmap
import socket
from abc import ABC, abstractmethod
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from afd_ray.handoff.mesh import Endpoint, LinkKind, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind, Message
from afd_ray.handoff.spin import SPIN_US

SIZES = tuple(256 << (2 * power) for power in range(8))  # 256 B to 4 MiB
HOST = "127.0.0.1"
RING_BYTES = 16 << 20
TIMEOUT_S = 30.0


class Way(ABC):
    """A way for two processes to hand bytes to each other and back."""

    def __init__(self, rank: int, pipe: Connection, scratch: Path) -> None:
        """`pipe` leads to the other process, which makes the same way at the same time; `scratch` is a directory of both."""
        self.rank = rank

    @abstractmethod
    def ping(self, size_bytes: int) -> None:
        """Send that many bytes, and take as many back."""

    @abstractmethod
    def pong(self, size_bytes: int) -> None:
        """Take that many bytes, and send as many back."""

    def close(self) -> None:  # noqa: B027
        """Give back what is not given back by itself."""


class BareShm(Way):
    """Two buffers and two counters in shared memory: copy in, count, look for the other's count, copy out."""

    def __init__(self, rank: int, pipe: Connection, scratch: Path) -> None:
        super().__init__(rank, pipe, scratch)
        path = scratch / "bare_shm"
        size_bytes = 4096 + 2 * SIZES[-1]
        if rank == 0:
            path.write_bytes(bytes(size_bytes))
            pipe.send(None)
        else:
            pipe.recv()
        with path.open("r+b") as file:
            whole = memoryview(mmap.mmap(file.fileno(), size_bytes))
        self.counts = whole[:4096].cast("Q")
        buffers = whole[4096 : 4096 + SIZES[-1]], whole[4096 + SIZES[-1] :]
        self.outgoing, self.incoming = buffers[rank], buffers[1 - rank]
        self.own = memoryview(bytearray(SIZES[-1]))
        self.sent_at, self.received_at = 64 * rank, 64 * (1 - rank)
        self.count = 0

    def send(self, size_bytes: int) -> None:
        self.outgoing[:size_bytes] = self.own[:size_bytes]
        self.counts[self.sent_at] = self.count

    def receive(self, size_bytes: int) -> None:
        counts, place, count = self.counts, self.received_at, self.count
        while counts[place] != count:
            pass
        self.own[:size_bytes] = self.incoming[:size_bytes]

    def ping(self, size_bytes: int) -> None:
        self.count += 1
        self.send(size_bytes)
        self.receive(size_bytes)

    def pong(self, size_bytes: int) -> None:
        self.count += 1
        self.receive(size_bytes)
        self.send(size_bytes)


class BareTcp(Way):
    """Blocking sockets: sendall, recv_into."""

    def __init__(self, rank: int, pipe: Connection, scratch: Path) -> None:
        super().__init__(rank, pipe, scratch)
        if rank == 0:
            with socket.create_server((HOST, 0)) as listener:
                pipe.send(listener.getsockname())
                self.connection, _ = listener.accept()
        else:
            self.connection = socket.create_connection(pipe.recv())
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.own = memoryview(bytearray(SIZES[-1]))

    def receive(self, size_bytes: int) -> None:
        received_bytes = 0
        while received_bytes < size_bytes:
            received_bytes += self.connection.recv_into(self.own[received_bytes:size_bytes])

    def ping(self, size_bytes: int) -> None:
        self.connection.sendall(self.own[:size_bytes])
        self.receive(size_bytes)

    def pong(self, size_bytes: int) -> None:
        self.receive(size_bytes)
        self.connection.sendall(self.own[:size_bytes])

    def tell(self, value: int) -> None:
        self.connection.sendall(value.to_bytes(8, "little"))

    def hear(self) -> int:
        self.receive(8)
        return int.from_bytes(self.own[:8], "little")

    def close(self) -> None:
        self.connection.close()


class BareGloo(Way):
    """ProcessGroupGloo's send and recv of one tensor."""

    def __init__(self, rank: int, pipe: Connection, scratch: Path) -> None:
        super().__init__(rank, pipe, scratch)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=TIMEOUT_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
        self.group = dist.ProcessGroupGloo(dist.FileStore(str(scratch / "bare_gloo"), 2), rank, 2, options)
        self.own = torch.zeros(SIZES[-1], dtype=torch.uint8)

    def ping(self, size_bytes: int) -> None:
        self.group.send([self.own[:size_bytes]], 1, 0).wait()
        self.group.recv([self.own[:size_bytes]], 1, 0).wait()

    def pong(self, size_bytes: int) -> None:
        self.group.recv([self.own[:size_bytes]], 0, 0).wait()
        self.group.send([self.own[:size_bytes]], 0, 0).wait()


class Link(Way):
    """An edge of a mesh: a tensor goes in, a tensor comes out."""

    kind: LinkKind
    under_way: bool

    def __init__(self, rank: int, pipe: Connection, scratch: Path) -> None:
        super().__init__(rank, pipe, scratch)
        self.mesh = open_link(self.kind, rank, pipe)
        self.own = torch.zeros(SIZES[-1], dtype=torch.uint8)
        self.header = Header(Kind.DISPATCH, epoch=0, source=rank)

    def next(self) -> Message:
        while (message := self.mesh.receive()) is None:
            self.mesh.wait(TIMEOUT_S, self.under_way)
        return message

    def ping(self, size_bytes: int) -> None:
        self.mesh.send(1, self.header, (self.own[:size_bytes],))
        self.next().release()

    def pong(self, size_bytes: int) -> None:
        message = self.next()
        self.mesh.send(0, self.header, message.tensors)
        message.release()

    def close(self) -> None:
        self.mesh.close()


def open_link(kind: LinkKind, rank: int, pipe: Connection) -> RingMesh:
    """One end of a group of two whose other end the other process opens at the same time."""
    mesh = open_mesh(rank, 2, 0, secret=b"benchmark", host=HOST, peers={1 - rank: RING_BYTES}, kind=kind, spin_us=SPIN_US)
    pipe.send(mesh.endpoint.to_dict())
    mesh.connect({1 - rank: Endpoint.from_dict(pipe.recv())}, TIMEOUT_S)
    return mesh


def link(kind: LinkKind, under_way: bool) -> type[Way]:
    return type(kind, (Link,), {"kind": kind, "under_way": under_way})


WAYS: dict[str, type[Way]] = {
    "bare_shm": BareShm,
    "shm": link("shm", under_way=True),
    "shm_parked": link("shm", under_way=False),
    "bare_tcp": BareTcp,
    "tcp": link("tcp", under_way=True),
    "tcp_parked": link("tcp", under_way=False),
    "bare_gloo": BareGloo,
    "gloo": link("gloo", under_way=False),
}
