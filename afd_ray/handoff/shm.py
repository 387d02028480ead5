"""Shared memory on one host: a receiver's segment of inbound rings, and the edge that writes into a peer's."""

import fcntl
import mmap
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.handoff.doorbell import Doorbell
from afd_ray.handoff.message import ALIGNMENT, Header, LinkError, layout_for, pack_into
from afd_ray.handoff.ring import CONTROL_BYTES, RingMemory, RingWriter, ring_memory

DIRECTORY = Path("/dev/shm")
PREFIX = "afd-ray-"
NONCE_BYTES = 16

_PAGE_BYTES = 4096
_DOORBELL_OFFSET = 64
_POLL_S = 20e-6


class RingPlace(NamedTuple):
    """One inbound ring's place in a segment."""

    control_offset: int
    data_offset: int
    capacity_bytes: int


class SegmentPlan(NamedTuple):
    """A segment: nonce, doorbell, then the control words and the bytes of each peer's ring."""

    rings: dict[int, RingPlace]
    size_bytes: int


def plan_segment(capacities: Mapping[int, int]) -> SegmentPlan:
    """Places for rings of the given sizes, by peer rank; both sides of an edge compute the same plan."""
    data_offset = _PAGE_BYTES + _paged(len(capacities) * CONTROL_BYTES)
    rings = {}
    for index, (peer, capacity_bytes) in enumerate(sorted(capacities.items())):
        if capacity_bytes < ALIGNMENT or capacity_bytes % ALIGNMENT:
            raise ValueError(f"ring capacity for rank {peer} is {capacity_bytes}, it must be a positive multiple of {ALIGNMENT}")
        rings[peer] = RingPlace(_PAGE_BYTES + index * CONTROL_BYTES, data_offset, capacity_bytes)
        data_offset += _paged(capacity_bytes)
    return SegmentPlan(rings, data_offset)


def _paged(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def supported() -> bool:
    """Whether processes here may share rings: the order of their plain stores is that of x86 (TSO)."""
    return platform.machine() == "x86_64" and DIRECTORY.is_dir()


class Segment:
    """A mapping with its rings and the word of its receiver's doorbell."""

    def __init__(self, mapping: mmap.mmap, plan: SegmentPlan, name: str) -> None:
        self.name = name
        self.rings: dict[int, RingMemory] = {peer: ring_memory(mapping, *place) for peer, place in plan.rings.items()}
        page = torch.frombuffer(mapping, dtype=torch.uint8, count=_PAGE_BYTES)
        self._word = memoryview(mapping)[_DOORBELL_OFFSET : _DOORBELL_OFFSET + 4].cast("I")
        self._page = page  # keeps the mapping alive while a doorbell holds its address

    def doorbell(self, poke: Callable[[], None]) -> Doorbell:
        """One side's hand on the receiver's doorbell; `poke` is that side's way to wake a receiver that waits on sockets."""
        return Doorbell(self._word, self._page.data_ptr() + _DOORBELL_OFFSET, poke)

    def unlink(self) -> None:
        """Remove the name; those who have the segment keep it. Harmless to repeat."""
        if self.name:
            (DIRECTORY / self.name).unlink(missing_ok=True)


def private_segment(capacities: Mapping[int, int]) -> Segment:
    """Rings that only this process sees: the receive buffers of socket edges."""
    plan = plan_segment(capacities)
    return Segment(mmap.mmap(-1, plan.size_bytes), plan, "")


def create_segment(capacities: Mapping[int, int], nonce: bytes) -> Segment:
    """A named segment for peers of this host; OSError when the host's shared memory is too small."""
    sweep_orphans()
    plan = plan_segment(capacities)
    name, descriptor = create_file()
    try:
        os.posix_fallocate(descriptor, 0, plan.size_bytes)  # a full /dev/shm is an error here, not a SIGBUS later
        mapping = mmap.mmap(descriptor, plan.size_bytes)
    except OSError:
        (DIRECTORY / name).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)  # the mapping keeps a duplicate, and with it the lock
    mapping[:NONCE_BYTES] = nonce
    return Segment(mapping, plan, name)


def create_file() -> tuple[str, int]:
    """An empty file of shared memory: its name, and a descriptor with a lock that says that its owner lives."""
    while True:
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(DIRECTORY / name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return name, descriptor
        os.close(descriptor)  # a sweep took it between the two calls


def sweep_orphans() -> None:
    """Remove segments whose owner died before its peers attached: nobody holds their lock."""
    for path in DIRECTORY.glob(PREFIX + "*"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def attach_segment(name: str, nonce: bytes, capacities: Mapping[int, int]) -> Segment | None:
    """The segment of a peer, or None when this host has no segment of that name and nonce."""
    if not name.startswith(PREFIX) or "/" in name:
        return None
    plan = plan_segment(capacities)
    try:
        descriptor = os.open(DIRECTORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size != plan.size_bytes:
            return None
        mapping = mmap.mmap(descriptor, plan.size_bytes)
    finally:
        os.close(descriptor)
    return Segment(mapping, plan, "") if mapping[:NONCE_BYTES] == nonce else None


class ShmEdge:
    """The sending end of an edge whose ring lies in the receiver's segment."""

    kind = "shm"

    def __init__(
        self, peer: int, segment: Segment, life: socket.socket, *, rank: int, digest: int, send_timeout_s: float
    ) -> None:
        """`life` is the connection to the peer that carries nothing: closing it tells of the end, and a byte on it wakes the peer."""
        memory = segment.rings[rank]
        self.peer = peer
        self.broken: str | None = None
        self.messages = 0
        self.size_bytes = 0
        self._segment = segment
        self._doorbell = segment.doorbell(partial(_poke, life))
        self._writer = RingWriter(memory)
        self._data = memory.data
        self._capacity_bytes = memory.capacity_bytes
        self._digest = digest
        self._send_timeout_s = send_timeout_s

    def send(self, header: Header, tensors: Sequence[Tensor]) -> None:
        if self.broken is not None:
            raise LinkError(self.peer, self.broken)
        layout = layout_for(tensors)
        length_bytes = layout.length_bytes
        offset = self._writer.reserve(length_bytes)
        if offset is None:
            offset = self._reserve_later(length_bytes)
        pack_into(self._data, offset, header, layout, self._digest)
        self._writer.copy(offset, layout, tensors)
        self._writer.publish(length_bytes)
        self._doorbell.ring()
        self.messages += 1
        self.size_bytes += length_bytes

    def fail(self, reason: str) -> None:
        self.broken = self.broken or reason

    def close(self) -> None:
        self.fail("this mesh is closed")

    def _reserve_later(self, length_bytes: int) -> int:
        if length_bytes > self._capacity_bytes:
            raise ValueError(f"message of {length_bytes} bytes to rank {self.peer}: its ring holds {self._capacity_bytes}")
        deadline_s = time.monotonic() + self._send_timeout_s
        while True:
            offset = self._writer.reserve(length_bytes)
            if offset is not None:
                return offset
            if self.broken is not None:
                raise LinkError(self.peer, self.broken)
            if time.monotonic() > deadline_s:
                raise LinkError(self.peer, f"its ring stayed full for {self._send_timeout_s:g} s")
            self._doorbell.ring()  # the ring's end may have been skipped, which the reader must pass first
            time.sleep(_POLL_S)


def _poke(life: socket.socket) -> None:
    with suppress(OSError):  # full of pokes already, or gone
        life.send(b"\0")
