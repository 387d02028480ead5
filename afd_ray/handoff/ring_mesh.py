"""The real group: a ring for each inbound edge, filled by a process of this host or from a socket."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.handoff.endpoint import Endpoint
from afd_ray.handoff.inbound import Inbound
from afd_ray.handoff.intake import Intake
from afd_ray.handoff.message import HEADER_BYTES, Header, Kind, LinkError, Message
from afd_ray.handoff.spin import Spin
from afd_ray.handoff.terms import Terms
from afd_ray.handoff.wiring import OWN_CLOSE, Wiring

_WARM_UP_POLL_S = 0.5e-3


class EdgeCount(NamedTuple):
    """What the edge to a peer has carried, headers included, from this member's side."""

    sent_messages: int
    sent_bytes: int
    received_messages: int
    received_bytes: int


class RingMesh:
    """One member of a group across processes and hosts; see `Mesh` for what it promises, `open_mesh` to make one."""

    device = None
    clock = None

    def __init__(self, terms: Terms, world_size: int, peers: Mapping[int, int], spin_us: float) -> None:
        self.rank = terms.rank
        self.world_size = world_size
        self.epoch = terms.epoch
        self._digest = terms.digest
        self._spin = Spin(spin_us * 1e-6)
        self._wiring = Wiring(terms, peers)
        self._doorbell = self._wiring.doorbell
        self._inbound = self._wiring.inbound
        self._outbound = self._wiring.outbound
        self._turns = _turns(self._inbound)
        self._turn = 0
        self._sockets: Intake | None = None
        self._closed = False

    @property
    def endpoint(self) -> Endpoint:
        """What the peers need for `connect`."""
        return self._wiring.endpoint

    @property
    def stale_messages(self) -> int:
        """Messages of other epochs, which were dropped."""
        return sum(edge.stale_messages for edge in self._inbound)

    def connect(self, endpoints: Mapping[int, Endpoint], timeout_s: float) -> None:
        """Build every edge, both ways, and carry one large message over each; call it on all members at the same time.

        Raises LinkError, one line naming the rank, for an edge that cannot be had, is silent or damages bytes.
        """
        deadline_s = time.monotonic() + timeout_s
        self._wiring.connect(endpoints, timeout_s, self._greet)
        if any(edge.kind == "tcp" for edge in self._inbound):
            self._sockets = self._wiring.intake
        if any(edge.kind == "gloo" for edge in self._inbound):
            self._spin = Spin(0.0)  # one that spins keeps the interpreter from the threads that receive
        self._await_greetings(timeout_s, deadline_s)

    def on_broken(self, tell: Callable[[LinkError], None]) -> None:
        """Call `tell` for each edge that breaks, as soon as that is known, on any thread; may be more than once for an edge.

        For those who do not receive: a receiver is told by `receive`, after what arrived before.
        """
        self._wiring.breaks.listener = tell

    def settle(self) -> None:
        """Nothing is launched."""

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        edge = self._outbound.get(peer)
        if edge is None:
            raise ValueError(f"peer is {peer}, rank {self.rank} is connected to ranks {sorted(self._outbound)}")
        edge.send(header, tensors)

    def receive(self) -> Message | None:
        message = self._next_arrived()
        if message is None and self._sockets is not None:
            self._sockets.look(0.0)
            message = self._next_arrived()
            if message is None and self._sockets.bulky and not self._sockets.lent:
                self._wiring.lend_intake()
        return message

    def _next_arrived(self) -> Message | None:
        if self._closed:
            raise LinkError(self.rank, OWN_CLOSE)
        for edge, after in self._turns[self._turn]:
            broken = edge.broken  # read before the ring: what it held is delivered first
            message = edge.receive()
            if message is not None:
                self._turn = after
                return message
            if broken is not None:
                self._turn = after
                raise LinkError(edge.peer, broken)
        return None

    def wait(self, timeout_s: float | None, under_way: bool = False) -> None:
        if self._sockets is not None and self._sockets.lent:
            self._wiring.reclaim_intake()
        began_s = time.perf_counter()
        spin_s = self._spin.budget_s if under_way else 0.0
        if timeout_s is not None:
            spin_s = min(spin_s, timeout_s)
        if not self._spin_until(began_s + spin_s):
            self._doorbell.park(self._ready, timeout_s, None if self._sockets is None else self._sockets.look)
        self._doorbell.woken = False
        if under_way:
            self._spin.learn(time.perf_counter() - began_s)

    def _spin_until(self, until_s: float) -> bool:
        """Look for messages until that time; whether to look further is over."""
        while not self._ready():
            if time.perf_counter() >= until_s:
                return False
            if self._sockets is not None:
                self._sockets.look(0.0)
        return True

    def _ready(self) -> bool:
        for edge in self._inbound:
            if edge.reader.ready():
                return True
        return self._doorbell.woken or self._closed or self._wiring.any_broken

    def wake(self) -> None:
        self._doorbell.wake()

    def capacity_to(self, peer: int) -> int:
        """Bytes of the ring that a connected peer has for this member: the largest message it takes, headers included."""
        return self._wiring.capacity_to(peer)

    def _greet(self, peer: int) -> None:
        """At once, while other edges are still being built: who waits for it is not to wait for those."""
        header = Header(Kind.WARMUP, epoch=self.epoch, source=self.rank)
        self.send(peer, header, [_pattern(self.rank, peer, self.capacity_to(peer))])

    def _await_greetings(self, timeout_s: float, deadline_s: float) -> None:
        silent = list(self._inbound)
        while silent := [edge for edge in silent if not self._warmed(edge)]:
            self._wiring.raise_broken()
            if time.monotonic() > deadline_s:
                ranks = ", ".join(str(edge.peer) for edge in silent)
                raise LinkError(silent[0].peer, f"its warm-up message has not come in {timeout_s:g} s; silent ranks: {ranks}")
            time.sleep(_WARM_UP_POLL_S)

    def _warmed(self, edge: Inbound) -> bool:
        if self._sockets is not None:
            self._sockets.look(0.0)
        message = edge.receive()
        if message is None:
            return False
        expected = _pattern(edge.peer, self.rank, edge.memory.capacity_bytes)
        intact = message.header.kind is Kind.WARMUP and torch.equal(message.tensors[0], expected)
        message.release()
        if not intact:
            raise LinkError(edge.peer, "its warm-up message arrived damaged")
        return True

    def edge_kinds(self) -> dict[int, str]:
        """What carries the messages to each connected peer: shm, tcp or gloo."""
        return {peer: edge.kind for peer, edge in self._outbound.items()}

    def edge_counts(self) -> dict[int, EdgeCount]:
        """What each connected edge has carried, by peer."""
        received = {edge.peer: (edge.messages, edge.size_bytes) for edge in self._inbound}
        return {peer: EdgeCount(edge.messages, edge.size_bytes, *received[peer]) for peer, edge in self._outbound.items()}

    def close(self) -> None:
        self._closed = True
        self._wiring.close()


def _turns(inbound: Sequence[Inbound]) -> list[tuple[tuple[Inbound, int], ...]]:
    """For each edge whose turn may be next: all edges from it on, each with the turn after it."""
    places = [(edge, (index + 1) % len(inbound)) for index, edge in enumerate(inbound)]
    return [tuple(places[turn:] + places[:turn]) for turn in range(max(len(places), 1))]


def _pattern(source: int, target: int, capacity_bytes: int) -> Tensor:
    """Half a ring of numbers that differ by edge; half, so that it fits wherever the ring's head stands."""
    count = max(capacity_bytes // 2 - HEADER_BYTES, 0) // 4
    return torch.arange(count, dtype=torch.int32) * 31 + (source * 1009 + target)
