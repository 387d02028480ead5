"""The in-process group behaves like a wired one."""

import threading

import pytest
import torch

from afd_ray.handoff.loopback import loopback_group
from afd_ray.handoff.message import Header, Kind, LinkError


def header(source: int, step: int = 0, epoch: int = 0) -> Header:
    return Header(Kind.TENSOR, epoch=epoch, source=source, step=step)


def test_messages_arrive_in_order_fairly_and_as_copies() -> None:
    first, second, third = loopback_group(3)
    payload = torch.ones(4)
    for step in range(2):
        second.send(0, header(1, step), [payload])
        third.send(0, header(2, step), [payload])
    payload.zero_()
    received = [message for _ in range(4) if (message := first.receive())]
    assert [(message.header.source, message.header.step) for message in received] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert all(torch.equal(message.tensors[0], torch.ones(4)) for message in received)
    assert first.receive() is None


def test_a_stale_epoch_is_dropped() -> None:
    first, second = loopback_group(2, epoch=5)
    second.send(0, header(1, step=1, epoch=4))
    second.send(0, header(1, step=2, epoch=5))
    message = first.receive()
    assert message is not None
    assert message.header.step == 2


def test_close_wakes_a_waiting_peer_after_what_was_sent() -> None:
    first, second = loopback_group(2)
    outcome: list[object] = []

    def read() -> None:
        try:
            while True:
                message = first.receive()
                if message is None:
                    first.wait(None)
                else:
                    outcome.append(message.header.kind)
        except LinkError as error:
            outcome.append(error.peer)

    reader = threading.Thread(target=read)
    reader.start()
    second.send(0, header(1))
    second.close()
    reader.join(timeout=10)
    assert outcome == [Kind.TENSOR, 1]
    with pytest.raises(LinkError, match="edge to rank 1: closed by the peer"):
        first.send(1, header(0))


def test_wake_ends_a_wait_without_a_message() -> None:
    first, _ = loopback_group(2)
    first.wake()
    first.wait(None)
    assert first.receive() is None


def test_poison_shows_a_read_after_release() -> None:
    first, second = loopback_group(2, poison=True)
    second.send(0, header(1), [torch.zeros(2, dtype=torch.uint8)])
    message = first.receive()
    assert message is not None
    message.release()
    assert message.tensors[0].tolist() == [0x7F, 0x7F]
