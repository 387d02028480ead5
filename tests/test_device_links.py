"""Links between devices, on a device that every machine has: what is sent arrives whole, is not overwritten, and nobody waits for the dead."""

import gc
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afd_ray.handoff.device.carrier import Ticket, frame_views, places_for
from afd_ray.handoff.device.device_mesh import DeviceMesh
from afd_ray.handoff.device.ipc import IpcCarrier
from afd_ray.handoff.device.nccl import NcclCarrier
from afd_ray.handoff.endpoint import Endpoint
from afd_ray.handoff.message import Header, Kind, LinkError, Message, layout_for
from tests.device_group import PLACES, WAIT_S, MakeCarrier, Pipes, connected, ipc, member, nccl, until
from tests.host_device import HostDevice, stalled

FRAME_BYTES = 1 << 14
LATE_S = 1e-3
SHM = Path("/dev/shm")
CARRIERS = [ipc, nccl]
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn)


def next_message(mesh: DeviceMesh) -> Message:
    while (message := mesh.receive()) is None:
        began_s = time.monotonic()
        mesh.wait(WAIT_S)
        assert time.monotonic() - began_s < WAIT_S, "nothing woke the reader"
    return message


def drawn(rng: random.Random) -> list[Tensor]:
    """Tensors of a message."""
    rows = rng.randint(0, 9)
    dtype = rng.choice(DTYPES)
    values = torch.tensor([rng.randint(0, 50) for _ in range(rows * 64)], dtype=torch.uint8)
    return [values.to(dtype).view(rows, 64), torch.full((rows, 2), rng.randint(0, 99), dtype=torch.int16)]


def pair(first: HostDevice, second: HostDevice) -> list[IpcCarrier]:
    """Two carriers that know each other, without a mesh."""
    carriers = [IpcCarrier(first, {1: FRAME_BYTES}, PLACES), IpcCarrier(second, {0: FRAME_BYTES}, PLACES)]
    for rank, carrier in enumerate(carriers):
        carrier.join({1 - rank: carriers[1 - rank].offer(rank)}, time.monotonic() + WAIT_S)
    for carrier in carriers:
        carrier.joined()
    return carriers


def closed(*carriers: IpcCarrier) -> None:
    for carrier in carriers:
        carrier.close()
    assert all(carrier.wait_closed(WAIT_S) for carrier in carriers)


def test_nothing_is_overwritten_before_it_is_read_however_late_streams_are() -> None:
    """The host never waits: it runs ahead of both streams, as far as there are places."""
    rng = random.Random(3)
    devices = [HostDevice(LATE_S, holds_up=False) for _ in range(2)]
    sender, receiver = pair(*devices)
    stream, wrong, held, read = devices[1].stream(), [], [], 0
    for number in range(150):
        tensors = drawn(rng)
        ticket = sender.post(1, layout_for(tensors), tensors)
        held.append((tensors, receiver.take(0, layout_for(tensors), ticket)))
        while held and (len(held) == PLACES or rng.random() < 0.4):
            sent, delivery = held.pop(rng.randrange(len(held)))
            delivery.arrive()

            def look(sent: list[Tensor] = sent, found: tuple[Tensor, ...] = delivery.tensors, number: int = number) -> None:
                if not all(torch.equal(ours.float(), theirs.float()) for ours, theirs in zip(sent, found, strict=True)):
                    wrong.append(number)

            stream.run(look)
            delivery.release()
            delivery.release()
            read += 1
    stream.synchronize()
    assert not wrong
    assert read >= 150 - PLACES
    closed(sender, receiver)
    assert [(d.allocated, d.opened, d.registered) for d in devices] == [(0, 0, 0)] * 2


def test_a_place_is_taken_again_only_when_its_reading_has_been_ordered() -> None:
    devices = [HostDevice(holds_up=False) for _ in range(2)]
    sender, receiver = pair(*devices)
    layout, tensors = layout_for([torch.zeros(8)]), [torch.zeros(8)]
    tickets = [sender.post(1, layout, tensors) for _ in range(PLACES)]
    assert sorted(ticket.place for ticket in tickets) == list(range(PLACES))
    sender._send_timeout_s = 0.05
    with pytest.raises(LinkError, match=r"edge to rank 1: its places stayed full for 0\.05 s"):
        sender.post(1, layout, tensors)
    delivery = receiver.take(0, layout, tickets[2])
    delivery.arrive()
    delivery.release()
    assert sender.post(1, layout, tensors) == Ticket(tickets[2].place, 2)
    closed(sender, receiver)


def test_numbers_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [HostDevice() for _ in range(2)]
    monkeypatch.setattr("afd_ray.handoff.device.ipc.ROUND", 4)  # as if words had two bits
    monkeypatch.setattr("afd_ray.handoff.device.ipc.reached", lambda word, value: (word - value) % 4 < 2)
    monkeypatch.setattr("tests.host_device.reached", lambda word, value: (word - value) % 4 < 2)
    sender, receiver = pair(*devices)
    for index in range(6 * PLACES):
        sent = torch.full((3,), float(index))
        delivery = receiver.take(0, layout_for([sent]), sender.post(1, layout_for([sent]), [sent]))
        delivery.arrive()
        assert torch.equal(delivery.tensors[0], sent)
        delivery.release()
    closed(sender, receiver)


def test_what_no_place_holds_is_refused() -> None:
    devices = [HostDevice() for _ in range(2)]
    sender, receiver = pair(*devices)
    large = [torch.zeros(FRAME_BYTES)]
    with pytest.raises(ValueError, match=f"to rank 1: a place there holds {FRAME_BYTES}"):
        sender.post(1, layout_for(large), large)
    with pytest.raises(ValueError, match=f"a place there holds {FRAME_BYTES}"):
        receiver.take(0, layout_for(large), Ticket(0, 1))
    with pytest.raises(ValueError, match=f"place {PLACES} of {PLACES}"):
        receiver.take(0, layout_for([]), Ticket(PLACES, 1))
    closed(sender, receiver)


def test_frames_lie_as_in_host_memory() -> None:
    tensors = [torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int32)]
    place = torch.zeros(1 << 10, dtype=torch.uint8)
    values, ids = frame_views(place, layout_for(tensors))
    assert (values.shape, values.dtype, ids.shape, ids.dtype) == ((3, 5), torch.bfloat16, (3, 2), torch.int32)
    assert [tensor.data_ptr() - place.data_ptr() for tensor in (values, ids)] == [192, 256]
    assert places_for(3) == 8


@pytest.mark.parametrize("carrier", CARRIERS)
def test_streams_that_wait_for_a_member_that_left_go_on_and_their_reader_is_told(carrier: MakeCarrier) -> None:
    """Its header had come, its rows had not: the stream is let go, and what it then read is not believed."""
    devices = [HostDevice(), HostDevice()]
    meshes = [member(rank, 2, {1 - rank: FRAME_BYTES}, device, carrier) for rank, device in enumerate(devices)]
    with connected(meshes):
        going = stalled(devices[1])
        meshes[1].send(0, Header(Kind.PARTIAL, epoch=0, source=1), [torch.ones(5)])
        message = next_message(meshes[0])
        leaving = threading.Timer(0.05, meshes[1].close)
        leaving.start()
        with suppress(LinkError):
            message.received()
        with pytest.raises(LinkError, match="edge to rank 1"):
            meshes[0].settle()
        going.set()
    until(lambda: all((d.allocated, d.opened, d.registered) == (0, 0, 0) for d in devices))


def test_who_abandons_is_known_before_its_streams_go_on() -> None:
    """Though the break of no link has been noticed, rows that are made of what never came are not believed."""
    devices = [HostDevice() for _ in range(2)]
    first, second = pair(*devices)
    first.check()
    second.abandon(LinkError(7, "somebody else is gone"))
    with pytest.raises(LinkError, match="edge to rank 1: it has abandoned the epoch"):
        first.check()
    with pytest.raises(LinkError, match="edge to rank 7: somebody else is gone"):
        second.post(0, layout_for([]), [])
    closed(first, second)


def test_by_nccl_a_rank_that_others_may_believe_closes_its_links_before_it_lets_its_stream_go() -> None:
    devices, told = [HostDevice(holds_up=False) for _ in range(2)], threading.Event()
    library = Pipes()
    carriers = [NcclCarrier(device, rank, {1 - rank: FRAME_BYTES}, PLACES, library, 0.1) for rank, device in enumerate(devices)]
    offers = [carrier.offer(1 - rank) for rank, carrier in enumerate(carriers)]
    with ThreadPoolExecutor(2) as pool:
        joins = [
            pool.submit(carrier.join, {1 - rank: offers[1 - rank]}, time.monotonic() + WAIT_S)
            for rank, carrier in enumerate(carriers)
        ]
    assert [join.result() for join in joins] == [None, None]
    rows = [torch.ones(5)]
    delivery = carriers[1].take(0, layout_for(rows), Ticket(0, 1))  # which is never sent
    delivery.arrive()
    through = devices[1].stream().mark()
    carriers[1].farewell = lambda: told.set() or None if not through.passed() else None
    carriers[1].abandon(LinkError(0, "gone"))
    until(through.passed)
    assert told.is_set(), "its stream went on first"
    carriers[0].close()
    assert all(carrier.wait_closed(WAIT_S) for carrier in carriers)
    assert [device.allocated for device in devices] == [0, 0]


def test_memory_is_freed_only_when_nobody_has_it_open() -> None:
    devices = [HostDevice() for _ in range(2)]
    first, second = pair(*devices)
    first.close()
    until(lambda: devices[0].opened == 0)
    assert not first.wait_closed(0.02)
    assert devices[0].allocated == 1, "the other one still has it open"
    closed(first, second)
    assert devices[0].allocated == devices[1].allocated == 0


# --- real processes -------------------------------------------------------------------------------------------------------


def join(rank: int, pipe: Connection, device: HostDevice, carrier: MakeCarrier) -> DeviceMesh:
    mesh = member(rank, 2, {1 - rank: FRAME_BYTES}, device, carrier)
    pipe.send(mesh.endpoint.to_dict())
    mesh.connect({1 - rank: Endpoint.from_dict(pipe.recv())}, timeout_s=WAIT_S)
    return mesh


def echo(pipe: Connection) -> None:
    """Echo what comes, through a late stream; once told "stall", send a header whose rows never come."""
    device = HostDevice(LATE_S)
    mesh = join(1, pipe, device, pipe.recv())
    with suppress(LinkError):
        while True:
            message = next_message(mesh)
            if message.header.rows:
                stalled(device)
            tensors = message.received()
            answer = Header(Kind.PARTIAL, epoch=0, source=1, step=message.header.step)
            mesh.send(0, answer, tensors)
            message.release()
    mesh.close()


@pytest.fixture
def peer() -> Iterator[tuple[Connection, BaseProcess]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=echo, args=(there,))
    process.start()
    yield here, process
    process.kill()
    process.join(WAIT_S)
    process.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_two_processes_hand_rows_over_and_one_that_is_killed_holds_nobody_up(
    peer: tuple[Connection, BaseProcess], carrier: MakeCarrier
) -> None:
    """Rows there and back; then a header whose rows never come, from a process that dies."""
    pipe, process = peer
    rng, device = random.Random(5), HostDevice(LATE_S)
    pipe.send(carrier)
    mesh = join(0, pipe, device, carrier)
    assert mesh.edge_kinds() == {1: carrier.__name__}
    for step in range(100):
        tensors = drawn(rng)
        mesh.send(1, Header(Kind.DISPATCH, epoch=0, source=0, step=step), tensors)
        message = next_message(mesh)
        found = message.received()
        assert message.header.step == step
        assert all(torch.equal(ours.float(), theirs.float()) for ours, theirs in zip(tensors, found, strict=True))
        message.release()
        mesh.settle()
    mesh.send(1, Header(Kind.DISPATCH, epoch=0, source=0, rows=1), [torch.ones(3)])
    message = next_message(mesh)
    process.kill()
    with suppress(LinkError):
        message.received()
    with pytest.raises(LinkError, match="edge to rank 1"):
        mesh.settle()
    with pytest.raises(LinkError, match="edge to rank 1"):
        next_message(mesh)
    mesh.close()
    until(lambda: (device.allocated, device.opened, device.registered) == (0, 0, 0))
    del message, found
    gc.collect()
    assert not [path for path in SHM.glob(f"afd-ray-{multiprocessing.current_process().pid}-*") if path.stat().st_size > 4096]
