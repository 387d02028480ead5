"""A byte ring from one writer to one reader, in which messages lie contiguous and are read in place."""

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from mmap import mmap
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.handoff.message import ALIGNMENT, Field, Layout

CONTROL_BYTES = 128  # head and tail on cache lines of their own
_HEAD_WORD = 0
_TAIL_WORD = 8
_SKIP = Struct("<I")
_SKIP_MAGIC = 0x50494B53  # "SKIP": the rest of the ring is empty, go on at its start


class RingMemory(NamedTuple):
    """Where a ring lives: two counters that only grow, and the bytes they count through."""

    words: memoryview  # uint64: head at 0 (the writer's), tail at 8 (the reader's)
    data: memoryview  # uint8, capacity_bytes
    address: int  # of data[0]
    tensor: Tensor  # uint8, the same bytes; keeps the mapping alive
    capacity_bytes: int


def ring_memory(mapping: mmap, control_offset: int, data_offset: int, capacity_bytes: int) -> RingMemory:
    if capacity_bytes < ALIGNMENT or capacity_bytes % ALIGNMENT:
        raise ValueError(f"ring capacity is {capacity_bytes} bytes, it must be a positive multiple of {ALIGNMENT}")
    whole = memoryview(mapping)
    tensor = torch.frombuffer(mapping, dtype=torch.uint8, count=capacity_bytes, offset=data_offset)
    return RingMemory(
        words=whole[control_offset : control_offset + CONTROL_BYTES].cast("Q"),
        data=whole[data_offset : data_offset + capacity_bytes],
        address=tensor.data_ptr(),
        tensor=tensor,
        capacity_bytes=capacity_bytes,
    )


class RingWriter:
    """The writing side; one thread only. What is stored before `publish` is seen by a reader that sees it (x86 TSO)."""

    def __init__(self, memory: RingMemory) -> None:
        self._memory = memory
        self._words = memory.words
        self._capacity = memory.capacity_bytes
        self._head = memory.words[_HEAD_WORD]

    def reserve(self, length_bytes: int) -> int | None:
        """Offset of that many contiguous free bytes, a multiple of ALIGNMENT; None while the reader holds too much."""
        free = self._capacity - (self._head - self._words[_TAIL_WORD])
        offset = self._head % self._capacity
        room = self._capacity - offset
        if room < length_bytes:
            if free < room:
                return None
            _SKIP.pack_into(self._memory.data, offset, _SKIP_MAGIC)
            self.publish(room)
            free -= room
            offset = 0
        return offset if length_bytes <= free else None

    def publish(self, length_bytes: int) -> None:
        self._head += length_bytes
        self._words[_HEAD_WORD] = self._head

    def copy(self, offset: int, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors of a frame that starts at `offset` to their places."""
        start = self._memory.address + offset
        for field, tensor in zip(layout.fields, tensors, strict=True):
            source = tensor if tensor.is_contiguous() and tensor.is_cpu else tensor.cpu().contiguous()
            ctypes.memmove(start + field.offset_bytes, source.data_ptr(), field.size_bytes)


class Lease:
    """A message's hold on its bytes of the ring; calling it gives them back, in any order, once."""

    __slots__ = ("_reader", "end", "released")

    def __init__(self, reader: "RingReader", end: int) -> None:
        self._reader = reader
        self.end = end
        self.released = False

    def __call__(self) -> None:
        if not self.released:
            self.released = True
            self._reader.reclaim()


class RingReader:
    """The reading side; one thread only. The tail passes over a message when it and all before it are released."""

    def __init__(self, memory: RingMemory) -> None:
        self.on_free: Callable[[], None] | None = None
        """Called after bytes became free."""
        self._memory = memory
        self._words = memory.words
        self._capacity = memory.capacity_bytes
        self._read = memory.words[_TAIL_WORD]
        self._leases: deque[Lease] = deque()
        self._typed: dict[torch.dtype, Tensor] = {}

    def ready(self) -> bool:
        return self._words[_HEAD_WORD] != self._read

    @property
    def held_bytes(self) -> int:
        """Bytes read and not yet given back to the writer."""
        return self._read - self._words[_TAIL_WORD]

    def peek(self) -> int | None:
        """Offset of the next message; None when all that has arrived is taken."""
        while self._words[_HEAD_WORD] != self._read:
            offset = self._read % self._capacity
            if _SKIP.unpack_from(self._memory.data, offset)[0] != _SKIP_MAGIC:
                return offset
            self.take(self._capacity - offset)()
        return None

    def published_bytes(self) -> int:
        """Bytes published and not taken; a message that announces more is damaged."""
        return int(self._words[_HEAD_WORD]) - self._read

    def take(self, length_bytes: int) -> Lease:
        """Pass over the message at `peek()`; its bytes stay until the lease is called."""
        self._read += length_bytes
        lease = Lease(self, self._read)
        self._leases.append(lease)
        return lease

    def view(self, offset: int, field: Field) -> Tensor:
        """The field of the frame at `offset`, as a tensor on the ring's own bytes."""
        base = self._typed.get(field.dtype)
        if base is None:
            base = self._typed[field.dtype] = self._memory.tensor.view(field.dtype)
        return base.as_strided(field.shape, field.strides, (offset + field.offset_bytes) // field.dtype.itemsize)

    def reclaim(self) -> None:
        leases = self._leases
        tail = 0
        while leases and leases[0].released:
            tail = leases.popleft().end
        if tail:
            self._words[_TAIL_WORD] = tail
            on_free = self.on_free
            if on_free is not None:
                on_free()
