"""What crosses an edge: a fixed-size header, tensors that describe themselves, and their place in a frame."""

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from afd_ray.handoff.device.streams import Clock

MAGIC = 0x52444641  # "AFDR"
VERSION = 4
ALIGNMENT = 64
HEADER_BYTES = 192
MAX_TENSORS = 4
MAX_DIMENSIONS = 4
MAX_FRAME_BYTES = 1 << 48
"""More than any memory has, and less than a frame's length can say."""

_FRAME = struct.Struct("<88sQB3xQIIIQIIQQQQ")  # prefix, contract digest, then the fields of Header
_PREFIX = struct.Struct("<IHBxQ72s")  # the same for every frame of a layout: magic, version, tensors, length, descriptors
_DESCRIPTORS = struct.Struct("<8B16I")
_MAX_LAYOUTS = 8192
_DTYPES = (
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES, start=1)}


class Kind(IntEnum):
    """What a message is for."""

    HELLO = 1
    STEP = 2
    PARK = 3
    WAVE = 4
    DISPATCH = 5
    REDUCE = 6
    PARTIAL = 7
    TENSOR = 8
    WARMUP = 9
    STOP = 10


_KINDS = {int(kind): kind for kind in Kind}


class Header(NamedTuple):
    """Which message this is; `source` is the sender's rank in the group."""

    kind: Kind
    epoch: int
    source: int
    slot: int = 0
    layer: int = 0
    step: int = 0
    rows: int = 0
    first_row: int = 0
    sent_ns: int = 0
    """The sender's wall clock."""
    busy_us: int = 0
    """PARTIAL: how long the FFN stage computed; 0 where that is not known."""
    queued_us: int = 0
    """PARTIAL: how long its rows had lain at the FFN rank before that, since it found them."""
    unseen_us: int = 0
    """PARTIAL: and how long before it found them, at most."""


def _nothing_to_release() -> None:
    pass


class Message(NamedTuple):
    """A header and views of the receive buffer, which are valid until `release()`; releasing twice is harmless."""

    header: Header
    tensors: tuple[Tensor, ...]
    release: Callable[[], None]
    arrive: Callable[[], None] | None = None
    """To be called before what reads the tensors is launched; None: they are there already.

    On a device both are orders to this thread's stream: it goes on once the tensors have come, and gives them back once it has read them.
    """

    @property
    def borrowed(self) -> bool:
        """Whether its tensors hold up what comes behind them on the edge."""
        return self.release is not _nothing_to_release and self.arrive is None

    def received(self) -> tuple[Tensor, ...]:
        """Its tensors, for what is launched from now on."""
        if self.arrive is not None:
            self.arrive()
        return self.tensors

    def copied(self) -> "Message":
        """The same message in memory of its own, its buffer released: for what cannot be used yet, lest it hold up the edge.

        On a device it stays where it is: there each message of an edge has a place of its own.
        """
        if self.arrive is not None:
            return self
        tensors = tuple([tensor.clone() for tensor in self.tensors])
        self.release()
        return Message(self.header, tensors, _nothing_to_release)


class LinkError(RuntimeError):
    """The edge to `peer` is gone, cannot be had, or speaks another contract. It is the same in another process."""

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason

    def __str__(self) -> str:
        return f"edge to rank {self.peer}: {self.reason}"


class Mesh(Protocol):
    """One member's view of a group: an edge to each of its peers.

    One thread sends, one thread receives, waits and releases (it may be the same one); any thread may wake.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def device(self) -> torch.device | None:
        """Where the tensors of DISPATCH, REDUCE and PARTIAL lie that are sent and received; None: in host memory, as all others do."""

    @property
    def clock(self) -> Clock | None:
        """Of the device, which the host runs ahead of; None: what is computed is computed when the call returns."""

    def settle(self) -> None:
        """Wait for all that this thread has launched; LinkError unless every tensor that it read had come whole.

        On a device a stream that waited for a peer which is gone goes on with whatever lay there.
        """

    def send(self, peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        """Copy the tensors once into the edge's buffer and return without waiting for the peer.

        Raises LinkError when the edge is closed or stays full past its deadline, ValueError for what no frame can carry.
        """

    def receive(self) -> Message | None:
        """The next message that has arrived from any peer: in order for an edge, fair over edges, stale epochs dropped.

        Raises LinkError once an edge is broken and the messages it still held are delivered.
        """

    def wait(self, timeout_s: float | None, under_way: bool = False) -> None:
        """Return when a message may have arrived, an edge broke, `wake` was called, or the time is over.

        `under_way`: a message is due; a member with a core of its own then looks for it a moment before it sleeps.
        """

    def wake(self) -> None:
        """End the current or the next `wait`; callable from any thread of this process."""

    def close(self) -> None:
        """Leave the group: the peers' readers wake at once with LinkError. Closing twice is harmless."""


Spec = tuple[torch.dtype, tuple[int, ...]]


class Field(NamedTuple):
    """One tensor's place in a frame; `offset_bytes` counts from the frame's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


class Layout(NamedTuple):
    """Where each tensor of a frame lies; every offset and the length are multiples of ALIGNMENT."""

    prefix: bytes
    """How such a frame begins, whatever its header."""
    fields: tuple[Field, ...]
    length_bytes: int


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _place(specs: Sequence[Spec]) -> tuple[tuple[Field, ...], int]:
    fields: list[Field] = []
    offset_bytes = HEADER_BYTES
    for dtype, shape in specs:
        size_bytes = prod(shape) * dtype.itemsize
        fields.append(Field(dtype, tuple(shape), offset_bytes, size_bytes))
        offset_bytes += aligned(size_bytes)
    return tuple(fields), offset_bytes


def layout_of(specs: Sequence[Spec]) -> Layout:
    """The layout of tensors given as (dtype, shape); ValueError for more or stranger tensors than a frame carries."""
    if len(specs) > MAX_TENSORS:
        raise ValueError(f"tensors: {len(specs)} in one message, at most {MAX_TENSORS} are allowed")
    codes = [0] * 8
    dims = [0] * 16
    for index, (dtype, shape) in enumerate(specs):
        if dtype not in _CODES:
            raise ValueError(f"tensor dtype {dtype} cannot travel, allowed: {', '.join(str(known) for known in _DTYPES)}")
        if len(shape) > MAX_DIMENSIONS or any(size >= 1 << 32 for size in shape):
            raise ValueError(f"tensor shape {tuple(shape)} cannot travel, at most {MAX_DIMENSIONS} dimensions under 2^32")
        codes[2 * index : 2 * index + 2] = _CODES[dtype], len(shape)
        dims[4 * index : 4 * index + len(shape)] = shape
    fields, length_bytes = _place(specs)
    if length_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"tensors of {length_bytes} bytes cannot travel in one message, at most {MAX_FRAME_BYTES} are allowed")
    descriptors = _DESCRIPTORS.pack(*codes, *dims)
    return Layout(_PREFIX.pack(MAGIC, VERSION, len(specs), length_bytes, descriptors), fields, length_bytes)


class _Layouts(dict[Spec, "_Layouts"]):
    """Layouts already made, as a tree: each branch adds one tensor."""

    def __init__(self, specs: tuple[Spec, ...]) -> None:
        self.specs = specs
        self.layout = layout_of(specs)

    def __missing__(self, spec: Spec) -> "_Layouts":
        branch = self[spec] = _Layouts((*self.specs, spec))
        return branch


_KNOWN = _Layouts(())


def layout_for(tensors: Sequence[Tensor]) -> Layout:
    """The layout of these tensors; ValueError as `layout_of`."""
    known = _KNOWN
    if len(known) > _MAX_LAYOUTS:
        known.clear()
    for tensor in tensors:
        known = known[tensor.dtype, tensor.shape]
    return known.layout


@lru_cache(maxsize=_MAX_LAYOUTS)
def layout_from(prefix: bytes) -> Layout:
    """The layout that a frame's prefix announces; ValueError with one line when it is not of this version, or damaged."""
    magic, version, count, length_bytes, descriptors = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ValueError(f"frame magic is {magic:#x}, not {MAGIC:#x}")
    if version != VERSION:
        raise ValueError(f"wire version is {version}, this side speaks {VERSION}")
    if count > MAX_TENSORS:
        raise ValueError(f"frame announces {count} tensors, at most {MAX_TENSORS} are allowed")
    values = _DESCRIPTORS.unpack(descriptors)
    codes, dims = values[:8], values[8:]
    specs = []
    for index in range(count):
        code, rank = codes[2 * index], codes[2 * index + 1]
        if not 1 <= code <= len(_DTYPES) or rank > MAX_DIMENSIONS:
            raise ValueError(f"frame announces dtype code {code} with {rank} dimensions")
        specs.append((_DTYPES[code - 1], dims[4 * index : 4 * index + rank]))
    layout = layout_of(specs)
    if layout.length_bytes != length_bytes:
        raise ValueError(f"frame length is {length_bytes} bytes, its tensors need {layout.length_bytes}")
    return layout


def pack_into(buffer: memoryview | bytearray, offset: int, header: Header, layout: Layout, digest: int) -> None:
    """Write the frame's header; ValueError when a field is negative or too large for it."""
    try:
        _FRAME.pack_into(buffer, offset, layout.prefix, digest, *header)
    except struct.error as error:
        raise ValueError(f"{header} cannot travel: {error}") from None


def length_of(buffer: memoryview, offset: int, limit_bytes: int) -> int:
    """A frame's length from its header, before the rest has come; ValueError when it cannot be one."""
    magic, version, _, length_bytes, _ = _PREFIX.unpack_from(buffer, offset)
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"frame begins with magic {magic:#x} and version {version}, not {MAGIC:#x} and {VERSION}")
    if not HEADER_BYTES <= length_bytes <= limit_bytes or length_bytes % ALIGNMENT:
        raise ValueError(f"frame length is {length_bytes} bytes, allowed: multiples of {ALIGNMENT} up to {limit_bytes}")
    return int(length_bytes)


def unpack_from(buffer: memoryview | bytearray, offset: int, digest: int) -> tuple[bytes, Header]:
    """A frame's prefix, for `layout_from`, and its header; ValueError with one line when it is not of this contract."""
    prefix, theirs, kind, *position = _FRAME.unpack_from(buffer, offset)
    if theirs != digest:
        raise ValueError(f"contract digest is {theirs:016x}, this side has {digest:016x}")
    if kind not in _KINDS:
        raise ValueError(f"message kind is {kind}, known are 1 to {max(_KINDS)}")
    return prefix, tuple.__new__(Header, (_KINDS[kind], *position))
