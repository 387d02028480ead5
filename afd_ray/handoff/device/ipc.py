"""Links between actors of one host: a sender's stream writes into the receiver's device memory, and words in shared host memory order both streams.

No multiprocessor is held by a stream that waits. An order to wait is given only for what the peer's host has ordered already, and that a
message may take a place again the sender's host learns from the receiver's: so streams that wait for each other always come on.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from afd_ray.handoff.device.carrier import Delivery, Ticket, check_length, frame_views
from afd_ray.handoff.device.ending import Ending
from afd_ray.handoff.device.streams import Device, Stream, reached
from afd_ray.handoff.device.words import CREDIT, FREE, FULL, Words, attach_words, create_words
from afd_ray.handoff.message import Kind, Layout, LinkError

ROUND = 1 << 32
_POLL_S = 20e-6
_LET_GO_S = 1e-3
_LEAVE_S = 60.0
"""For peers to close what they have open of this member's memory; it is not freed before."""

_log = logging.getLogger(__name__)


class Outlet:
    """Places of a peer's that this member writes into."""

    def __init__(self, memory: Tensor, words: Words, first_line: int, places: int) -> None:
        self.memory, self.words, self.first_line = memory, words, first_line
        self.place_bytes = len(memory) // places
        self.posted = [0] * places
        self._next = 0

    def free_place(self) -> int | None:
        """One whose last message has been ordered to be read, the longest unused first; None: there is none."""
        for turn in range(len(self.posted)):
            place = (self._next + turn) % len(self.posted)
            if self.words.read(self.first_line + place, CREDIT) == self.posted[place]:
                self._next = (place + 1) % len(self.posted)
                return place
        return None

    def let_go(self) -> None:
        """Have this member's streams wait no more for places."""
        for place, number in enumerate(self.posted):
            _raise_to(self.words, self.first_line + place, FREE, number)


class Inlet:
    """Places that a peer writes into, in this member's memory."""

    def __init__(self, memory: Tensor, words: Words, first_line: int, places: int) -> None:
        self.memory, self.words, self.first_line = memory, words, first_line
        self.place_bytes = len(memory) // places
        self.taken = [0] * places

    def place(self, index: int) -> Tensor:
        return self.memory[index * self.place_bytes : (index + 1) * self.place_bytes]

    def let_go(self) -> None:
        """Have this member's streams wait no more for messages."""
        for place, number in enumerate(self.taken):
            _raise_to(self.words, self.first_line + place, FULL, number)


def _raise_to(words: Words, line: int, word: int, value: int) -> None:
    if not reached(words.read(line, word), value):
        words.store(line, word, value)


class Offer(NamedTuple):
    """Where a peer's places are."""

    words: str
    """Name of the segment."""
    first_line: int
    places: int
    size_bytes: int
    handle: str
    """Hexadecimal."""


class IpcCarrier(Ending):
    """A `Carrier` for peers on this host. Peers give and take alike: each opens what the other offers."""

    name = "ipc"
    kinds = frozenset({Kind.DISPATCH, Kind.REDUCE, Kind.PARTIAL})

    def __init__(self, device: Device, peers: Mapping[int, int], places: int, send_timeout_s: float = 10.0) -> None:
        """`peers`: the longest frame in bytes from each rank, 0 for one that sends none."""
        super().__init__(device)
        self._places, self._send_timeout_s = places, send_timeout_s
        senders = sorted(peer for peer, frame_bytes in peers.items() if frame_bytes)
        self._peers = sorted(peers)
        self._own = create_words(device, len(senders) * places)
        self._inlets: dict[int, Inlet] = {}
        try:
            for index, peer in enumerate(senders):
                memory = device.allocate(places * -(-peers[peer] // 256) * 256)
                self._inlets[peer] = Inlet(memory, self._own.words, index * places, places)
        except BaseException:
            self._own.unlink()
            for inlet in self._inlets.values():
                device.free(inlet.memory)
            raise
        self._outlets: dict[int, Outlet] = {}
        self._theirs: dict[int, Words] = {}

    def offer(self, peer: int) -> bytes:
        inlet = self._inlets.get(peer)
        given = Offer(self._own.name, 0, 0, 0, "")
        if inlet is not None:
            handle = self.device.export(inlet.memory).hex()
            given = Offer(self._own.name, inlet.first_line, self._places, len(inlet.memory), handle)
        return json.dumps(given._asdict()).encode()

    def join(self, offers: dict[int, bytes], deadline_s: float) -> None:
        for peer in self._peers:
            offer = Offer(**json.loads(offers[peer]))
            try:
                words = self._theirs[peer] = attach_words(self.device, offer.words)
                if offer.places:
                    memory = self.device.open(bytes.fromhex(offer.handle), offer.size_bytes)
                    self._outlets[peer] = Outlet(memory, words, offer.first_line, offer.places)
            except (OSError, RuntimeError) as error:
                raise LinkError(peer, f"its device memory cannot be opened: {error}") from None

    def carries(self, peer: int) -> tuple[int, int]:
        outlet, inlet = self._outlets.get(peer), self._inlets.get(peer)
        return (0 if outlet is None else outlet.place_bytes, 0 if inlet is None else inlet.place_bytes)

    def joined(self) -> None:
        """Everybody has opened what this member offered: its words need no name any more."""
        self._own.unlink()

    def post(self, peer: int, layout: Layout, tensors: Sequence[Tensor]) -> Ticket:
        outlet = self._outlets[peer]
        check_length(peer, layout, outlet.place_bytes)
        until_s: float | None = None
        while True:
            with self.orders:
                stream, place = self.stream(), outlet.free_place()
                if place is not None:
                    return self._put(stream, outlet, place, layout, tensors)
            until_s = until_s or time.monotonic() + self._send_timeout_s
            if time.monotonic() > until_s:
                raise LinkError(peer, f"its places stayed full for {self._send_timeout_s:g} s")
            time.sleep(_POLL_S)

    def _put(self, stream: Stream, outlet: Outlet, place: int, layout: Layout, tensors: Sequence[Tensor]) -> Ticket:
        line, start, before = outlet.first_line + place, place * outlet.place_bytes, outlet.posted[place]
        number = outlet.posted[place] = (before + 1) % ROUND
        stream.wait(outlet.words.address(line, FREE), before)
        for view, tensor in zip(frame_views(outlet.memory[start : start + outlet.place_bytes], layout), tensors, strict=True):
            stream.copy(view, tensor)
        stream.write(outlet.words.address(line, FULL), number)
        return Ticket(place, number)

    def take(self, peer: int, layout: Layout, ticket: Ticket) -> Delivery:
        inlet, (place, number) = self._inlets[peer], ticket
        check_length(peer, layout, inlet.place_bytes)
        if place >= self._places:
            raise ValueError(f"place {place} of {self._places}")
        line = inlet.first_line + place
        held = True

        def arrive() -> None:
            with self.orders:
                stream = self.stream()
                inlet.taken[place] = number
                stream.wait(inlet.words.address(line, FULL), number)

        def release() -> None:
            nonlocal held
            with self.orders:
                if held and self.over is None:
                    held = False
                    self.stream().write(inlet.words.address(line, FREE), number)
                    inlet.words.store(line, CREDIT, number)

        return Delivery(frame_views(inlet.place(place), layout), arrive, release)

    def check(self) -> None:
        with self.orders:
            if self.over is not None:
                raise self.over
            for peer, words in self._theirs.items():
                if words.abandoned:
                    raise LinkError(peer, "it has abandoned the epoch")

    def warn(self) -> None:
        self._own.words.abandon()

    def wind_up(self) -> None:
        self._let_go()
        while not self.orders.acquire(timeout=_LET_GO_S):
            self._let_go()
        marks = self.marks()
        self.orders.release()
        while not all(mark.passed() for mark in marks):
            self._let_go()  # again and again: what a peer had ordered before may still store less
            time.sleep(_LET_GO_S)
        for outlet in self._outlets.values():
            self.device.close(outlet.memory)
        self._own.unlink()
        self._own.words.close()
        self._give_back()

    def _let_go(self) -> None:
        for inlet in self._inlets.values():
            inlet.let_go()
        for outlet in self._outlets.values():
            outlet.let_go()

    def _give_back(self) -> None:
        """Nobody may have memory open that is freed."""
        until_s = time.monotonic() + _LEAVE_S
        while any(words.owner_is_there() for words in self._theirs.values()):
            if time.monotonic() > until_s:
                _log.warning("peers have device memory of an ended epoch still open: it is not freed")
                return
            time.sleep(_LET_GO_S)
        for words in self._theirs.values():
            words.close()
        for inlet in self._inlets.values():
            self.device.free(inlet.memory)
