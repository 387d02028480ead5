"""A group whose rows stay in device memory: headers take a mesh of the host's links, the rows of most messages a carrier between devices."""

import struct
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from afd_ray.handoff.device.carrier import Carrier, Ticket
from afd_ray.handoff.device.streams import Clock, Device, TimedMark
from afd_ray.handoff.endpoint import Endpoint
from afd_ray.handoff.message import HEADER_BYTES, Header, Kind, LinkError, Message, layout_for, layout_from
from afd_ray.handoff.ring_mesh import EdgeCount, RingMesh

PAYLOAD = frozenset({Kind.DISPATCH, Kind.REDUCE, Kind.PARTIAL})
"""Whose tensors lie on the device at both ends."""
_TICKET = struct.Struct("<88sIQ")  # how a frame of these tensors begins, place, number
_PATIENCE_S = 0.05


class DeviceMesh:
    """A `Mesh` over a mesh that is not connected yet, which then belongs to it.

    Everything but rows is that mesh's: order, epochs, wake-ups, and what is noticed of peers that go away; of that the carrier is told.
    """

    def __init__(self, control: RingMesh, carrier: Carrier, device: Device) -> None:
        self.rank, self.world_size, self.epoch = control.rank, control.world_size, control.epoch
        self.device: torch.device | None = device.place
        self.clock: Clock | None = self._timed_mark
        self._control, self._carrier, self._device = control, carrier, device
        self._early: list[Message] = []
        self._tell: Callable[[LinkError], None] = lambda error: None
        control.on_broken(self._on_broken)
        carrier.farewell = control.close

    @property
    def endpoint(self) -> Endpoint:
        return self._control.endpoint

    @property
    def stale_messages(self) -> int:
        return self._control.stale_messages

    def connect(self, endpoints: Mapping[int, Endpoint], timeout_s: float) -> None:
        """As `RingMesh.connect`, and a message over each edge between devices, so that nothing is set up later."""
        deadline_s = time.monotonic() + timeout_s
        self._control.connect(endpoints, timeout_s)
        peers = sorted(self._control.edge_kinds())
        with self._device.aside():
            for peer in peers:
                offer = torch.frombuffer(bytearray(self._carrier.offer(peer)), dtype=torch.uint8)
                self._control.send(peer, self._header(Kind.HELLO), (offer,))
            offers = self._collect(Kind.HELLO, peers, deadline_s)
            self._carrier.join({peer: bytes(offer.tensors[0].numpy()) for peer, offer in offers.items()}, deadline_s)
            there = {peer: self._carrier.carries(peer) for peer in peers}
            for peer, (out_bytes, _) in there.items():
                tensors = (self._pattern(self.rank, peer, out_bytes),) if out_bytes else ()
                self._send_carried(peer, self._header(Kind.WARMUP), tensors)
            for peer, greeting in self._collect(Kind.WARMUP, peers, deadline_s).items():
                self._greeted(greeting, there[peer][1])
            self.settle()
        self._carrier.joined()

    def on_broken(self, tell: Callable[[LinkError], None]) -> None:
        self._tell = tell

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        if header.kind in self._carrier.kinds:
            self._send_carried(peer, header, tensors)
        else:
            self._control.send(peer, header, tensors)

    def receive(self) -> Message | None:
        message = self._control.receive()
        if message is None or not message.tensors or message.header.kind not in PAYLOAD:
            return message
        if message.header.kind in self._carrier.kinds:
            return self._carried(message)
        tensors = tuple([tensor.to(self.device, copy=True) for tensor in message.tensors])
        message.release()
        return Message(message.header, tensors, _nothing)

    def settle(self) -> None:
        self._device.stream().synchronize()
        self._carrier.check()

    def wait(self, timeout_s: float | None, under_way: bool = False) -> None:
        self._control.wait(timeout_s, under_way)

    def wake(self) -> None:
        self._control.wake()

    def capacity_to(self, peer: int) -> int:
        return self._control.capacity_to(peer)

    def edge_kinds(self) -> dict[int, str]:
        """What carries the rows to each connected peer."""
        return dict.fromkeys(self._control.edge_kinds(), self._carrier.name)

    def edge_counts(self) -> dict[int, EdgeCount]:
        """What the host's links have carried; rows are not counted."""
        return self._control.edge_counts()

    def close(self) -> None:
        self._carrier.close()
        self._control.close()

    def _timed_mark(self) -> TimedMark:
        return self._device.stream().timed_mark()

    def _on_broken(self, error: LinkError) -> None:
        """At once: this member's thread may be waiting for a stream that waits for that peer."""
        self._carrier.abandon(error)
        self._tell(error)

    def _header(self, kind: Kind) -> Header:
        return Header(kind, epoch=self.epoch, source=self.rank)

    def _send_carried(self, peer: int, header: Header, tensors: Sequence[Tensor]) -> None:
        """The header last: whoever has it may order its stream to wait."""
        if not tensors:
            self._control.send(peer, header)
            return
        layout = layout_for(tensors)
        ticket = self._carrier.post(peer, layout, tensors)
        told = bytearray(_TICKET.pack(layout.prefix, *ticket))
        self._control.send(peer, header, (torch.frombuffer(told, dtype=torch.uint8),))

    def _carried(self, message: Message) -> Message:
        peer = message.header.source
        try:
            prefix, place, number = _TICKET.unpack(bytes(message.tensors[0].numpy()))
            delivery = self._carrier.take(peer, layout_from(prefix), Ticket(place, number))
        except (ValueError, struct.error) as error:
            raise LinkError(peer, f"its header tells of rows that cannot be: {error}") from None
        finally:
            message.release()
        return Message(message.header, delivery.tensors, delivery.release, delivery.arrive)

    def _collect(self, kind: Kind, peers: Sequence[int], deadline_s: float) -> dict[int, Message]:
        """One message of this kind from each peer; what comes ahead of its time is kept."""
        found: dict[int, Message] = {}
        early, self._early = self._early, []
        while True:
            for message in early:
                if message.header.kind is kind:
                    found[message.header.source] = message
                else:
                    self._early.append(message)
            missing = [peer for peer in peers if peer not in found]
            if not missing:
                return found
            if time.monotonic() > deadline_s:
                raise LinkError(missing[0], f"its {kind.name.lower()} between devices has not come in time")
            came = self._control.receive()
            early = [] if came is None else [came.copied()]
            if came is None:
                self._control.wait(_PATIENCE_S)

    def _greeted(self, message: Message, frame_bytes: int) -> None:
        """LinkError unless the peer's pattern has come whole."""
        peer = message.header.source
        message = self._carried(message) if message.tensors else message
        expected = self._pattern(peer, self.rank, frame_bytes) if frame_bytes else None
        came = message.received()
        intact = expected is None if not came else expected is not None and torch.equal(came[0].cpu(), expected.cpu())
        self._carrier.check()
        message.release()
        if not intact:
            raise LinkError(peer, "its warm-up message between devices arrived damaged")

    def _pattern(self, source: int, target: int, frame_bytes: int) -> Tensor:
        """Numbers that differ by edge, as many as there is room for."""
        count = max(frame_bytes - HEADER_BYTES, 4) // 4
        return torch.arange(count, dtype=torch.int32, device=self.device) * 31 + (source * 1009 + target)


def _nothing() -> None:
    pass
