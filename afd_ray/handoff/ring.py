"""A byte ring from one writer to one reader, in which messages lie contiguous and are read in place."""

import ctypes
from collections import deque
from collections.abc import Sequence
from mmap import mmap
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from afd_ray.handoff.message import ALIGNMENT, Field, Layout, layout_from

CONTROL_BYTES = 128  # head and tail on cache lines of their own
_HEAD_WORD = 0
_RESTART_WORD = 1
_TAIL_WORD = 8
_SKIP = Struct("<I")
_SKIP_MAGIC = 0x50494B53  # "SKIP": the rest of the ring is empty, go on at its start
_MAX_VIEWS = 4096
_WARM_BYTES = 1 << 16
"""Past this, an empty ring begins again at its start: memory used a moment ago is in the caches of both sides."""

# Straight from address to address, and without letting go of the interpreter: both cost more than a small tensor's copy.
_MEMMOVE = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
_SIZES = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t)
_copy = ctypes.PYFUNCTYPE(None, *_SIZES)(_MEMMOVE)
_copy_large = ctypes.CFUNCTYPE(None, *_SIZES)(_MEMMOVE)
_LARGE_BYTES = 1 << 20
"""A copy from here on lets go of it: a group that warms up must not hold up the step loop that serves in another."""


class RingMemory(NamedTuple):
    """Where a ring lives: counters that only grow, and the bytes they count through."""

    words: memoryview  # uint64: head at 0 and restart at 1 (the writer's), tail at 8 (the reader's)
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


def copy_tensors(address: int, layout: Layout, tensors: Sequence[Tensor]) -> None:
    """Copy the tensors of a frame that lies at `address` to their places."""
    for (_, _, offset, size_bytes), tensor in zip(layout.fields, tensors, strict=True):
        source = tensor if tensor.is_contiguous() and tensor.is_cpu else tensor.cpu().contiguous()
        copy = _copy if size_bytes < _LARGE_BYTES else _copy_large
        copy(address + offset, source.data_ptr(), size_bytes)


class RingWriter:
    """The writing side; one thread only. What is stored before `publish` is seen by a reader that sees it (x86 TSO)."""

    def __init__(self, memory: RingMemory) -> None:
        self.offset = 0
        """Where the next message begins."""
        self._data = memory.data
        self._words = memory.words
        self._address = memory.address
        self._capacity = memory.capacity_bytes
        self._head = memory.words[_HEAD_WORD]
        self._limit = self._head + self._capacity
        """What the head may reach; the reader's tail, whose cache line is the reader's, is looked up only when it is reached."""

    def reserve(self, length_bytes: int) -> int | None:
        """Offset of that many contiguous free bytes, a multiple of ALIGNMENT; None while the reader holds too much."""
        room = self._capacity - self.offset
        if self._head + length_bytes > self._limit or room < length_bytes or self.offset >= _WARM_BYTES:
            self._limit = self._words[_TAIL_WORD] + self._capacity
            if self._head + self._capacity == self._limit:
                self._restart()
            elif room < length_bytes and not self._skip(room):
                return None
        return self.offset if self._head + length_bytes <= self._limit else None

    def _restart(self) -> None:
        """The ring is empty: the next message lies at its start, whatever the head, and the whole ring is free for it."""
        self._words[_RESTART_WORD] = self._head
        self.offset = 0

    def _skip(self, room: int) -> bool:
        """Leave the ring's end empty, if the reader holds none of it."""
        if self._head + room > self._limit:
            return False
        _SKIP.pack_into(self._data, self.offset, _SKIP_MAGIC)
        self.publish(room)
        return True

    def free_bytes(self) -> int:
        """Contiguous free bytes at `offset`."""
        self._limit = self._words[_TAIL_WORD] + self._capacity
        return min(self._limit - self._head, self._capacity - self.offset)

    def publish(self, length_bytes: int) -> None:
        self._head += length_bytes
        self.offset = (self.offset + length_bytes) % self._capacity
        self._words[_HEAD_WORD] = self._head

    def copy(self, offset: int, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors of a frame that starts at `offset` to their places."""
        copy_tensors(self._address + offset, layout, tensors)


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


class Contents(NamedTuple):
    """What a frame holds."""

    tensors: tuple[Tensor, ...]  # on the ring's own bytes
    length_bytes: int


class RingReader:
    """The reading side; one thread only. The tail passes over a message when it and all before it are released."""

    def __init__(self, memory: RingMemory) -> None:
        self._memory = memory
        self._words = memory.words
        self._marks = memory.data.cast("I")
        self._capacity = memory.capacity_bytes
        self._read = memory.words[_TAIL_WORD]
        self._offset = 0
        self._leases: deque[Lease] = deque()
        self._contents: dict[tuple[int, bytes], Contents] = {}

    def ready(self) -> bool:
        return self._words[_HEAD_WORD] != self._read

    @property
    def held_bytes(self) -> int:
        """Bytes read and not yet given back to the writer."""
        return self._read - self._words[_TAIL_WORD]

    def peek(self) -> int | None:
        """Offset of the next message; None when all that has arrived is taken."""
        while self._words[_HEAD_WORD] != self._read:
            if self._words[_RESTART_WORD] == self._read:
                self._offset = 0
            if self._marks[self._offset >> 2] != _SKIP_MAGIC:
                return self._offset
            self.take(self._capacity - self._offset)()
        return None

    def take(self, length_bytes: int) -> Lease:
        """Pass over the message at `peek()`; its bytes stay until the lease is called.

        Raises ValueError for more bytes than have been published: such a message is damaged.
        """
        read = self._read + length_bytes
        if read > self._words[_HEAD_WORD]:
            raise ValueError(f"frame length is {length_bytes} bytes, fewer have arrived")
        self._read = read
        self._offset = (self._offset + length_bytes) % self._capacity
        lease = Lease(self, read)
        self._leases.append(lease)
        return lease

    def contents(self, offset: int, prefix: bytes) -> Contents:
        """What lies in the frame at `offset`; kept, since the ring's frames come round to the same places.

        Raises ValueError for a prefix that is not of this version, or damaged.
        """
        found = self._contents.get((offset, prefix))
        if found is None:
            layout = layout_from(prefix)
            if offset + layout.length_bytes > self._capacity:
                raise ValueError(f"frame length is {layout.length_bytes} bytes, fewer have arrived")
            tensors = tuple([self._view(offset, field) for field in layout.fields])
            found = Contents(tensors, layout.length_bytes)
            if len(self._contents) >= _MAX_VIEWS:
                self._contents.clear()
            self._contents[offset, prefix] = found
        return found

    def _view(self, offset: int, field: Field) -> Tensor:
        start = offset + field.offset_bytes
        return self._memory.tensor[start : start + field.size_bytes].view(field.dtype).view(field.shape)

    def reclaim(self) -> None:
        """Move the tail over the messages that are released."""
        leases = self._leases
        tail = 0
        while leases and leases[0].released:
            tail = leases.popleft().end
        if tail:
            self._words[_TAIL_WORD] = tail
