"""Links by NCCL: for each edge and direction a communicator of two ranks, and streams beside the one that computes.

A receive is ordered when the header has come, so in the order of the sends, which are ordered before their headers: every send finds its receive.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from afd_ray.handoff.device.carrier import Delivery, Ticket, check_length, frame_views
from afd_ray.handoff.device.ending import Ending
from afd_ray.handoff.device.streams import Device, Mark, Stream
from afd_ray.handoff.message import Kind, Layout, LinkError

SENDER, RECEIVER = 0, 1
_LEAVE_S = 60.0
"""For aborted communicators to let streams go; memory is not freed before."""
_ORDER_S = 1.0
"""For an order that is just being given; whoever is stuck in it is let go by the abort."""
_POLL_S = 1e-3

_log = logging.getLogger(__name__)


class Communicator(Protocol):
    """Of two ranks, SENDER and RECEIVER. What fails raises RuntimeError in one line."""

    def send(self, data: Tensor, stream: Stream) -> None:
        """[bytes] uint8."""

    def receive(self, data: Tensor, stream: Stream) -> None:
        """As many bytes as are sent."""

    def abort(self) -> None:
        """What is ordered ends, whatever the other one does; may take its time."""


class Library(Protocol):
    """What makes communicators."""

    def unique_id(self) -> bytes:
        """Of a communicator to be."""

    def communicator(self, unique_id: bytes, rank: int) -> Communicator:
        """Waits for the other rank."""


class Way:
    """One direction of an edge, at one of its ends: a communicator, a stream, and places in this device's memory."""

    def __init__(self, device: Device, places: int, frame_bytes: int, communicator: Communicator) -> None:
        self.communicator, self.stream = communicator, device.side_stream()
        self.place_bytes = -(-frame_bytes // 256) * 256
        self.memory = device.allocate(places * self.place_bytes)
        self.done: list[Mark | None] = [None] * places
        """What may still read or write each place."""
        self.free = deque(range(places))
        self.count = 0

    def frame(self, place: int, length_bytes: int) -> Tensor:
        start = place * self.place_bytes
        return self.memory[start : start + length_bytes]


class NcclCarrier(Ending):
    """A `Carrier` for peers on any host.

    REDUCE it leaves to host memory: what never came whole would go on as a sum of somebody else's.
    """

    name = "nccl"
    kinds = frozenset({Kind.DISPATCH, Kind.PARTIAL})

    def __init__(
        self, device: Device, rank: int, peers: Mapping[int, int], places: int, library: Library, linger_s: float = 0.0
    ) -> None:
        """`peers`: the longest frame in bytes from each rank, 0 for one that sends none.

        `linger_s`: streams are let go so long after all is over, half of it with the host's links closed. An FFN rank that is let go sends
        others what it made of rows that never came: by then those have left the epoch.
        """
        super().__init__(device)
        self._linger_s = linger_s
        self._rank, self._places, self._library = rank, places, library
        self._frames = dict(peers)
        self._ids: dict[int, list[bytes]] = {}
        self._out: dict[int, Way] = {}
        self._in: dict[int, Way] = {}
        self._made: list[Communicator] = []

    def offer(self, peer: int) -> bytes:
        """The lower rank draws ids for the way up and the way down."""
        if self._rank < peer:
            self._ids[peer] = [self._library.unique_id() for _ in range(2)]
        ids = [unique_id.hex() for unique_id in self._ids.get(peer, [])]
        return json.dumps({"ids": ids, "frame_bytes": self._frames[peer]}).encode()

    def join(self, offers: dict[int, bytes], deadline_s: float) -> None:
        """Edges in one order that all members have, so that nobody waits in a circle."""
        told = {peer: json.loads(offers[peer]) for peer in self._frames}
        for peer in sorted(told, key=lambda peer: (min(peer, self._rank), max(peer, self._rank))):
            up = self._rank < peer
            up_id, down_id = self._ids[peer] if up else map(bytes.fromhex, told[peer]["ids"])
            for sends, unique_id in ((up, up_id), (not up, down_id)):
                frame_bytes = told[peer]["frame_bytes"] if sends else self._frames[peer]
                if frame_bytes:
                    made = self._within(peer, deadline_s, unique_id, SENDER if sends else RECEIVER)
                    (self._out if sends else self._in)[peer] = Way(self.device, self._places, frame_bytes, made)

    def joined(self) -> None:
        """Nothing is kept for it."""

    def carries(self, peer: int) -> tuple[int, int]:
        out, inn = self._out.get(peer), self._in.get(peer)
        return (0 if out is None else out.place_bytes, 0 if inn is None else inn.place_bytes)

    def post(self, peer: int, layout: Layout, tensors: Sequence[Tensor]) -> Ticket:
        way = self._out[peer]
        check_length(peer, layout, way.place_bytes)
        with self.orders:
            stream, place = self.stream(), way.count % self._places
            way.count += 1
            _follow(stream, way.done[place])
            frame = way.frame(place, layout.length_bytes)
            for view, tensor in zip(frame_views(frame, layout), tensors, strict=True):
                stream.copy(view, tensor)
            way.stream.follow(stream.mark())
            way.communicator.send(frame, way.stream)
            way.done[place] = way.stream.mark()
        return Ticket(place, way.count & 0xFFFF_FFFF)

    def take(self, peer: int, layout: Layout, ticket: Ticket) -> Delivery:
        way = self._in[peer]
        check_length(peer, layout, way.place_bytes)
        with self.orders:
            self.stream()
            way.count += 1
            if ticket.number != way.count & 0xFFFF_FFFF or not way.free:
                raise ValueError(f"message {ticket.number} where {way.count} is due, {len(way.free)} places free")
            place = way.free.popleft()
            frame = way.frame(place, layout.length_bytes)
            _follow(way.stream, way.done[place])
            way.communicator.receive(frame, way.stream)
            came = way.stream.mark()

        def arrive() -> None:
            with self.orders:
                self.stream().follow(came)

        held = True

        def release() -> None:
            nonlocal held
            with self.orders:
                if held and self.over is None:
                    held = False
                    way.done[place] = self.stream().mark()
                    way.free.append(place)

        return Delivery(frame_views(frame, layout), arrive, release)

    def check(self) -> None:
        if self.over is not None:
            raise self.over

    def warn(self) -> None:
        """The host's links are what tells of this member's end."""

    def wind_up(self) -> None:
        if self._linger_s:
            time.sleep(self._linger_s / 2)
            self.farewell()  # half of it is for the step loop, whose own close would say why
            time.sleep(self._linger_s / 2)
        given = self.orders.acquire(timeout=_ORDER_S)
        aborts = [threading.Thread(target=made.abort, name="nccl-abort", daemon=True) for made in self._made]
        for abort in aborts:
            abort.start()  # all at once: the kernel of one may wait for that of another
        ways = [*self._out.values(), *self._in.values()]
        marks = [*self.marks(), *(way.stream.mark() for way in ways)]
        if given:
            self.orders.release()
        until_s = time.monotonic() + _LEAVE_S
        while any(abort.is_alive() for abort in aborts) or not all(mark.passed() for mark in marks):
            if time.monotonic() > until_s:
                _log.warning("NCCL has not let go of the streams of an ended epoch: their memory is not freed")
                return
            time.sleep(_POLL_S)
        for way in ways:
            self.device.free(way.memory)

    def _within(self, peer: int, deadline_s: float, unique_id: bytes, rank: int) -> Communicator:
        """LinkError when the peer has not come in time; what waits for it is left behind then."""
        made, failed = self._aside(lambda: self._library.communicator(unique_id, rank), deadline_s)
        if made is None:
            raise LinkError(peer, f"NCCL could not connect: {failed or 'it has not come in time'}")
        self._made.append(made)
        if self.over is not None:
            made.abort()
            raise self.over
        return made

    def _aside(self, make: Callable[[], Communicator], deadline_s: float) -> tuple[Communicator | None, str]:
        found: dict[str, Any] = {}

        def run() -> None:
            try:
                found["made"] = make()
            except Exception as error:  # a thread of its own: what a library raises would be nobody's
                found["failed"] = f"{type(error).__name__}: {error}"

        thread = threading.Thread(target=run, name="nccl-connect", daemon=True)
        thread.start()
        thread.join(max(0.0, deadline_s - time.monotonic()))
        return found.get("made"), found.get("failed", "")


def _follow(stream: Stream, mark: Mark | None) -> None:
    if mark is not None:
        stream.follow(mark)
