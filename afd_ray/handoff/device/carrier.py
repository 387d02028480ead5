"""What carries rows between devices, behind the headers that say what they are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from afd_ray.handoff.message import Kind, Layout, LinkError

PLACES_A_SLOT = 2
"""Where rows are routed, others may be ahead of an instance that got none."""
SPARE_PLACES = 2


class Ticket(NamedTuple):
    """Which of an edge's messages it is."""

    place: int
    number: int


class Delivery(NamedTuple):
    """A message's tensors in device memory; see `Message` for `arrive` and `release`."""

    tensors: tuple[Tensor, ...]
    arrive: Callable[[], None]
    release: Callable[[], None]


class Carrier(Protocol):
    """One member's part of the links between devices. The thread that sends and receives over the mesh calls `post` and `take`; any thread the rest."""

    name: str
    """Of the kind of link."""
    kinds: frozenset[Kind]
    """Of the messages whose tensors it carries; those of others pass through host memory."""
    farewell: Callable[[], None]
    """To be set: closes the host's links."""

    def offer(self, peer: int) -> bytes:
        """What the peer needs for `join`."""

    def join(self, offers: dict[int, bytes], deadline_s: float) -> None:
        """Make a way to and from every peer; LinkError, naming the rank, where there is none."""

    def joined(self) -> None:
        """Every peer has joined."""

    def carries(self, peer: int) -> tuple[int, int]:
        """The longest frames to the peer and from it, in bytes; 0: none."""

    def post(self, peer: int, layout: Layout, tensors: Sequence[Tensor]) -> Ticket:
        """Order the tensors on their way, behind what makes them; they may be overwritten by what is ordered next."""

    def take(self, peer: int, layout: Layout, ticket: Ticket) -> Delivery:
        """What the peer posted, as its header has come; in the order of the headers."""

    def check(self) -> None:
        """LinkError if a stream that has been waited for may have gone on without what it waited for."""

    def abandon(self, reason: LinkError) -> None:
        """Have all streams go on, and take and give nothing any more; returns at once, harmless to repeat."""

    def close(self) -> None:
        """As `abandon`, by choice; memory is given back, in the background, once no stream and no peer uses it."""


def places_for(slots: int) -> int:
    """How many messages of one edge and direction lie in places of their own: with so many nobody waits to send."""
    return PLACES_A_SLOT * slots + SPARE_PLACES


def frame_views(place: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The tensors of a frame in a place [bytes] uint8; as in host memory, but that the header's bytes stay unused."""
    return tuple([place[offset : offset + size].view(dtype).view(shape) for dtype, shape, offset, size in layout.fields])


def check_length(peer: int, layout: Layout, place_bytes: int) -> None:
    """ValueError for a frame that is longer than a place."""
    if layout.length_bytes > place_bytes:
        raise ValueError(f"message of {layout.length_bytes} bytes to rank {peer}: a place there holds {place_bytes}")
