"""The ring against a model: whatever the sizes and the order of release, bytes arrive once, in order, unharmed."""

import mmap
import random
from collections import deque

import pytest
import torch

from afd_ray.handoff.message import HEADER_BYTES, Header, Kind, layout_for, pack_into, unpack_from
from afd_ray.handoff.ring import CONTROL_BYTES, Lease, RingReader, RingWriter, ring_memory


def ring(capacity_bytes: int) -> tuple[RingWriter, RingReader]:
    memory = ring_memory(mmap.mmap(-1, CONTROL_BYTES + capacity_bytes), 0, CONTROL_BYTES, capacity_bytes)
    return RingWriter(memory), RingReader(memory)


def write(writer: RingWriter, reader: RingReader, step: int, tensor: torch.Tensor) -> bool:
    layout = layout_for([tensor])
    offset = writer.reserve(layout.length_bytes)
    if offset is None:
        return False
    pack_into(reader._memory.data, offset, Header(Kind.TENSOR, 0, 0, step=step), layout, 0)
    writer.copy(offset, layout, [tensor])
    writer.publish(layout.length_bytes)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_equals_a_queue(seed: int) -> None:
    draw = random.Random(seed)
    writer, reader = ring(4096)
    queued: deque[tuple[int, torch.Tensor]] = deque()
    held: list[tuple[torch.Tensor, torch.Tensor, Lease]] = []
    written = received = refused = 0
    while received < 1500:
        tensor = torch.full((draw.choice([0, 1, 63, 500, 3900]),), draw.randrange(256), dtype=torch.uint8)
        if draw.random() < 0.5:
            if write(writer, reader, written, tensor):
                queued.append((written, tensor))
                written += 1
            else:
                refused += 1
        elif (offset := reader.peek()) is not None:
            prefix, header = unpack_from(reader._memory.data, offset, 0)
            (view,), length_bytes = reader.contents(offset, prefix)
            step, sent = queued.popleft()
            assert header.step == step
            held.append((view, sent, reader.take(length_bytes)))
            received += 1
        while held and (len(held) > 3 or draw.random() < 0.3):
            view, sent, lease = held.pop(draw.randrange(len(held)))
            assert torch.equal(view, sent)
            lease()
    assert refused > 0


def test_the_tail_waits_for_the_oldest_message() -> None:
    writer, reader = ring(1024)
    leases = []
    for step in range(4):
        assert write(writer, reader, step, torch.zeros(256 - HEADER_BYTES, dtype=torch.uint8))
        assert reader.peek() is not None
        leases.append(reader.take(256))
    for lease in (leases[2], leases[1], leases[1]):
        lease()
    assert reader.held_bytes == 1024
    assert not write(writer, reader, 4, torch.zeros(1, dtype=torch.uint8))
    leases[0]()
    assert reader.held_bytes == 256
    leases[3]()
    assert reader.held_bytes == 0


def test_a_message_as_large_as_the_ring_fits_as_soon_as_the_ring_is_empty() -> None:
    writer, reader = ring(1024)
    assert write(writer, reader, 0, torch.zeros(256 - HEADER_BYTES, dtype=torch.uint8))
    reader.peek()
    lease = reader.take(256)
    assert not write(writer, reader, 1, torch.zeros(1024 - HEADER_BYTES, dtype=torch.uint8))
    lease()
    reader.peek()  # passes the end, if that was skipped
    assert write(writer, reader, 1, torch.zeros(1024 - HEADER_BYTES, dtype=torch.uint8))
    assert reader.peek() == 0


@pytest.mark.parametrize("first_bytes", [100 << 10, 255 << 10])
def test_an_empty_ring_takes_what_fits_into_it_without_its_reader(first_bytes: int) -> None:
    """Else two sides that send at once, each into a ring that only the other could tidy up, wait for each other."""
    writer, reader = ring(256 << 10)
    assert write(writer, reader, 0, torch.zeros(first_bytes - HEADER_BYTES, dtype=torch.uint8))
    reader.peek()
    reader.take(first_bytes)()
    for step in (1, 2):
        assert write(writer, reader, step, torch.zeros((128 << 10) - HEADER_BYTES, dtype=torch.uint8))
    assert reader.peek() == 0


def test_views_lie_on_the_ring_itself() -> None:
    writer, reader = ring(1024)
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    assert write(writer, reader, 0, values.t())
    offset = reader.peek()
    assert offset is not None
    prefix, _ = unpack_from(reader._memory.data, offset, 0)
    (view,), _ = reader.contents(offset, prefix)
    assert torch.equal(view, values.t())
    assert view.data_ptr() == reader._memory.address + offset + HEADER_BYTES
    assert view.data_ptr() % 64 == 0


def test_a_capacity_off_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="ring capacity is 100 bytes"):
        ring(100)
