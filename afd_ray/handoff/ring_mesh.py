"""The real group: a ring for each inbound edge, filled by a process of this host or from a socket."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.handoff.endpoint import Endpoint
from afd_ray.handoff.message import HEADER_BYTES, Frame, Header, Kind, LinkError, Message, unpack_from
from afd_ray.handoff.wiring import OWN_CLOSE, Inbound, Terms, Wiring

_WARM_UP_POLL_S = 0.5e-3


class EdgeCount(NamedTuple):
    """What the edge to a peer has carried, headers included, from this member's side."""

    sent_messages: int
    sent_bytes: int
    received_messages: int
    received_bytes: int


class RingMesh:
    """One member of a group across processes and hosts; see `Mesh` for what it promises, `open_mesh` to make one."""

    def __init__(self, terms: Terms, world_size: int, peers: Mapping[int, int], spin_us: float) -> None:
        self.rank = terms.rank
        self.world_size = world_size
        self.epoch = terms.epoch
        self.stale_messages = 0
        self._digest = terms.digest
        self._spin_s = spin_us * 1e-6
        self._wiring = Wiring(terms, peers)
        self._doorbell = self._wiring.doorbell
        self._inbound = self._wiring.inbound
        self._outbound = self._wiring.outbound
        self._next_edge = 0
        self._closed = False

    @property
    def endpoint(self) -> Endpoint:
        """What the peers need for `connect`."""
        return self._wiring.endpoint

    def connect(self, endpoints: Mapping[int, Endpoint], timeout_s: float) -> None:
        """Build every edge, both ways; LinkError or TimeoutError, one line naming the rank, when one cannot be had."""
        self._wiring.connect(endpoints, timeout_s)
        if any(edge.kind == "tcp" for edge in self._inbound):
            self._spin_s = 0.0  # a spinning reader would keep the interpreter from the thread that reads the sockets

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        edge = self._outbound.get(peer)
        if edge is None:
            raise ValueError(f"peer is {peer}, rank {self.rank} is connected to ranks {sorted(self._outbound)}")
        edge.send(header, tensors)

    def receive(self) -> Message | None:
        if self._closed:
            raise LinkError(self.rank, OWN_CLOSE)
        count = len(self._inbound)
        for turn in range(count):
            index = (self._next_edge + turn) % count
            edge = self._inbound[index]
            broken = edge.broken  # read before the ring: what it held is delivered first
            message = self._receive_from(edge)
            if message is not None:
                self._next_edge = index + 1
                return message
            if broken is not None:
                self._next_edge = index + 1
                raise LinkError(edge.peer, broken)
        return None

    def _receive_from(self, edge: Inbound) -> Message | None:
        reader = edge.reader
        while (offset := reader.peek()) is not None:
            header, layout = self._decode(edge, offset)
            release = reader.take(layout.length_bytes)
            edge.messages += 1
            edge.size_bytes += layout.length_bytes
            if header.epoch == self.epoch:
                return Message(header, tuple([reader.view(offset, field) for field in layout.fields]), release)
            self.stale_messages += 1
            release()
        return None

    def _decode(self, edge: Inbound, offset: int) -> Frame:
        try:
            frame = unpack_from(edge.memory.data, offset, self._digest)
            if frame.layout.length_bytes > edge.reader.published_bytes():
                raise ValueError(f"frame length is {frame.layout.length_bytes} bytes, fewer have arrived")
            if frame.header.source != edge.peer:
                raise ValueError(f"frame claims to come from rank {frame.header.source}")
        except ValueError as error:
            edge.broken = str(error)
            raise LinkError(edge.peer, str(error)) from None
        return frame

    def wait(self, timeout_s: float | None) -> None:
        self._doorbell.wait(self._ready, timeout_s, self._spin_s)

    def _ready(self) -> bool:
        for edge in self._inbound:
            if edge.reader.ready():
                return True
        return self._closed or self._wiring.any_broken

    def wake(self) -> None:
        self._doorbell.wake()

    def capacity_to(self, peer: int) -> int:
        """Bytes of the ring that a connected peer has for this member: the largest message it takes, headers included."""
        return self._wiring.capacity_to(peer)

    def warm_up(self, timeout_s: float) -> None:
        """Carry one large message over every edge, both ways, and check it; call on all members, before other messages.

        Raises LinkError for an edge that is broken or damages bytes, TimeoutError for one that stays silent.
        """
        deadline_s = time.monotonic() + timeout_s
        for peer in self._outbound:
            header = Header(Kind.WARMUP, epoch=self.epoch, source=self.rank)
            self.send(peer, header, [_pattern(self.rank, peer, self.capacity_to(peer))])
        silent = list(self._inbound)
        while silent := [edge for edge in silent if not self._warmed(edge)]:
            self._wiring.raise_broken()
            if time.monotonic() > deadline_s:
                ranks = ", ".join(str(edge.peer) for edge in silent)
                raise TimeoutError(f"rank {self.rank} waited {timeout_s:g} s for the warm-up message of ranks: {ranks}")
            time.sleep(_WARM_UP_POLL_S)

    def _warmed(self, edge: Inbound) -> bool:
        message = self._receive_from(edge)
        if message is None:
            return False
        expected = _pattern(edge.peer, self.rank, edge.memory.capacity_bytes)
        intact = message.header.kind is Kind.WARMUP and torch.equal(message.tensors[0], expected)
        message.release()
        if not intact:
            raise LinkError(edge.peer, "its warm-up message arrived damaged")
        return True

    def edge_kinds(self) -> dict[int, str]:
        """What carries the messages to each connected peer: shm or tcp."""
        return {peer: edge.kind for peer, edge in self._outbound.items()}

    def edge_counts(self) -> dict[int, EdgeCount]:
        """What each connected edge has carried, by peer."""
        received = {edge.peer: (edge.messages, edge.size_bytes) for edge in self._inbound}
        return {peer: EdgeCount(edge.messages, edge.size_bytes, *received[peer]) for peer, edge in self._outbound.items()}

    def close(self) -> None:
        self._closed = True
        self._wiring.close()


def _pattern(source: int, target: int, capacity_bytes: int) -> Tensor:
    """Half a ring of numbers that differ by edge; half, so that it fits wherever the ring's head stands."""
    count = max(capacity_bytes // 2 - HEADER_BYTES, 0) // 4
    return torch.arange(count, dtype=torch.int32) * 31 + (source * 1009 + target)
