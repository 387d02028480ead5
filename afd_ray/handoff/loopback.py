"""A group inside one process: queues instead of wires, for tests and the one-process engine."""

import threading
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from afd_ray.handoff.message import Header, LinkError, Mesh, Message, layout_for


class LoopbackMesh:
    """One member of an in-process group; `close` reaches the peers as a broken edge, as on a wire."""

    device = None
    clock = None

    def __init__(self, rank: int, world_size: int, epoch: int, poison: bool) -> None:
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self.members: list[LoopbackMesh] = []
        self.stale_messages = 0
        self._poison = poison
        self._arrived = threading.Condition()
        self._inbox: list[deque[tuple[Header, tuple[Tensor, ...]]]] = [deque() for _ in range(world_size)]
        self._next_edge = 0
        self._woken = False
        self._closed = False

    def settle(self) -> None:
        """Nothing is launched."""

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        if not 0 <= peer < self.world_size or peer == self.rank:
            raise ValueError(f"peer is {peer}, rank {self.rank} of {self.world_size} has no edge to it")
        layout_for(tensors)
        if self._closed:
            raise LinkError(peer, f"rank {self.rank} has closed its mesh")
        self.members[peer]._deliver(header, tuple(tensor.detach().clone().contiguous() for tensor in tensors))

    def _deliver(self, header: Header, tensors: tuple[Tensor, ...]) -> None:
        with self._arrived:
            if self._closed:
                raise LinkError(self.rank, "closed by the peer")
            self._inbox[header.source].append((header, tensors))
            self._arrived.notify_all()

    def receive(self) -> Message | None:
        if self._closed:
            raise LinkError(self.rank, "this mesh is closed")
        for turn in range(self.world_size):
            peer = (self._next_edge + turn) % self.world_size
            gone = self.members[peer]._closed  # read before the queue: what it held is delivered first
            message = self._receive_from(peer)
            if message is not None:
                self._next_edge = (peer + 1) % self.world_size
                return message
            if gone:
                self._next_edge = (peer + 1) % self.world_size
                raise LinkError(peer, "closed by the peer")
        return None

    def _receive_from(self, peer: int) -> Message | None:
        inbox = self._inbox[peer]
        while inbox:
            header, tensors = inbox.popleft()
            if header.epoch == self.epoch:
                return Message(header, tensors, _Release(tensors if self._poison else ()))
            self.stale_messages += 1
        return None

    def wait(self, timeout_s: float | None, under_way: bool = False) -> None:
        with self._arrived:
            self._arrived.wait_for(self._ready, timeout_s)
            self._woken = False

    def _ready(self) -> bool:
        return self._woken or any(self._inbox) or any(member._closed for member in self.members)

    def wake(self) -> None:
        with self._arrived:
            self._woken = True
            self._arrived.notify_all()

    def close(self) -> None:
        self._closed = True
        for member in self.members:
            with member._arrived:
                member._arrived.notify_all()


class _Release:
    """Overwrites the tensors, as a reused receive buffer would, so that a late read is seen in a test."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors

    def __call__(self) -> None:
        for tensor in self._tensors:
            tensor.fill_(0x7F)
        self._tensors = ()


def loopback_group(world_size: int, epoch: int = 0, *, poison: bool = False) -> list[Mesh]:
    """All members of an in-process group; with `poison`, a released message's tensors are overwritten."""
    members = [LoopbackMesh(rank, world_size, epoch, poison) for rank in range(world_size)]
    for member in members:
        member.members = members
    return list(members)
