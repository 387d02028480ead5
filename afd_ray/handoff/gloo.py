"""Gloo point to point, for hosts where nothing else passes and as a peer to measure: an edge that sends, an inlet that fills a ring.

Gloo can neither tell a message's size beforehand nor give up a receive: a header goes ahead of each body, and a goodbye, answered by
one, ends both directions.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from afd_ray.handoff.message import HEADER_BYTES, Header, LinkError, layout_for, length_of, pack_into
from afd_ray.handoff.ring import RingMemory, RingWriter, copy_tensors

PEER_CLOSED = "closed by the peer"

_dist: Any = torch.distributed  # whose type stubs leave out gloo's options, its point-to-point calls and the stores
_GOODBYE = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
_FOREVER = timedelta(days=365)
_LINGER_S = 0.2
_POLL_S = 100e-6
_TAG = 0


class Pair(Protocol):
    """A group of two."""

    def rank(self) -> int: ...
    def send(self, tensors: list[Tensor], rank: int, tag: int) -> torch.distributed.Work: ...
    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> torch.distributed.Work: ...


class Meeting:
    """Where a member's peers of higher rank find the addresses of its side; listens on `host` alone."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener:
            self.port: int = listener.getsockname()[1]
            self.store = _dist.TCPStore(
                host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
            )


def join_meeting(host: str, port: int, timeout_s: float) -> Any:
    """The store of the peer that listens there; RuntimeError when it cannot be reached in time."""
    return _dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def pair_up(store: Any, name: str, *, first: bool, host: str, timeout_s: float) -> Pair:
    """The two ends of an edge as a group of two, in which the peer is the other rank; RuntimeError after the timeout."""
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=host)]
    pair: Pair = _dist.ProcessGroupGloo(_dist.PrefixStore(name, store), 0 if first else 1, 2, options)
    return pair


class GlooEdge:
    """The sending end: a message is copied, and sent by a thread of its own."""

    kind = "gloo"

    def __init__(self, peer: int, group: Pair, *, capacity_bytes: int, digest: int, send_timeout_s: float) -> None:
        """`capacity_bytes` is that of the peer's ring: the largest message, and the most that is queued here."""
        self.peer = peer
        self.broken: str | None = None
        self.messages = 0
        self.size_bytes = 0
        self._group = group
        self._capacity_bytes = capacity_bytes
        self._digest = digest
        self._send_timeout_s = send_timeout_s
        self._queue: deque[Tensor] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"gloo-to-{peer}", daemon=True)
        self._thread.start()

    def send(self, header: Header, tensors: Sequence[Tensor]) -> None:
        layout = layout_for(tensors)
        length_bytes = layout.length_bytes
        if length_bytes > self._capacity_bytes:
            raise ValueError(f"message of {length_bytes} bytes to rank {self.peer}: its ring holds {self._capacity_bytes}")
        frame = torch.empty(length_bytes, dtype=torch.uint8)
        pack_into(frame.numpy().data, 0, header, layout, self._digest)
        copy_tensors(frame.data_ptr(), layout, tensors)
        with self._changed:
            self._await_room(length_bytes)
            self._queue.append(frame)
            self._queued_bytes += length_bytes
            self._changed.notify_all()
        self.messages += 1
        self.size_bytes += length_bytes

    def fail(self, reason: str) -> None:
        with self._changed:
            self.broken = self.broken or reason
            self._changed.notify_all()

    def close(self) -> None:
        """What gloo has not taken within a moment is lost."""
        self.fail("this mesh is closed")
        self._thread.join(_LINGER_S)

    def _await_room(self, length_bytes: int) -> None:
        if not self._changed.wait_for(
            lambda: self.broken is not None or self._queued_bytes + length_bytes <= self._capacity_bytes, self._send_timeout_s
        ):
            raise LinkError(self.peer, f"its queue stayed full for {self._send_timeout_s:g} s")
        if self.broken is not None:
            raise LinkError(self.peer, self.broken)

    def _run(self) -> None:
        try:
            while (frame := self._next()) is not None:
                self._hand_over(frame[:HEADER_BYTES])
                if len(frame) > HEADER_BYTES:
                    self._hand_over(frame[HEADER_BYTES:])
                with self._changed:
                    self._queued_bytes -= len(frame)
                    self._changed.notify_all()
            self._hand_over(_GOODBYE)
        except RuntimeError:
            self.fail(PEER_CLOSED)

    def _next(self) -> Tensor | None:
        """The next frame, once there is one; None when the edge is over and all are sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self.broken is not None)
            return self._queue.popleft() if self._queue else None

    def _hand_over(self, part: Tensor) -> None:
        self._group.send([part], _peer_of(self._group), _TAG).wait(_FOREVER)


class GlooInlet:
    """Receives one peer's frames into their ring, on a thread of its own that ends with the peer's goodbye."""

    def __init__(self, group: Pair, memory: RingMemory, ring_bell: Callable[[], None], on_broken: Callable[[str], None]) -> None:
        self._group = group
        self._memory = memory
        self._writer = RingWriter(memory)
        self._ring_bell = ring_bell
        self._on_broken = on_broken
        self._head = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._closed = False
        threading.Thread(target=self._run, name="gloo-inlet", daemon=True).start()

    def close(self) -> None:
        """Take no more; what still comes until the peer's goodbye is dropped."""
        self._closed = True

    def _run(self) -> None:
        try:
            while self._receive_frame():
                self._ring_bell()
            self._on_broken(PEER_CLOSED)
        except RuntimeError:
            self._on_broken(PEER_CLOSED)
        except ValueError as error:
            self._on_broken(str(error))

    def _receive_frame(self) -> bool:
        """Put the next frame into the ring; False: it was a goodbye."""
        self._fill(self._head)
        if torch.equal(self._head, _GOODBYE):
            return False
        length_bytes = length_of(self._head.numpy().data, 0, self._memory.capacity_bytes)
        offset = self._await_room(length_bytes)
        if offset is None:
            if length_bytes > HEADER_BYTES:
                self._fill(torch.empty(length_bytes - HEADER_BYTES, dtype=torch.uint8))
            return True
        frame = self._memory.tensor[offset : offset + length_bytes]
        frame[:HEADER_BYTES] = self._head
        if length_bytes > HEADER_BYTES:
            self._fill(frame[HEADER_BYTES:])
        self._writer.publish(length_bytes)
        return True

    def _await_room(self, length_bytes: int) -> int | None:
        while not self._closed:
            offset = self._writer.reserve(length_bytes)
            if offset is not None:
                return offset
            self._ring_bell()  # the ring's end may have been skipped, which the reader must pass first
            time.sleep(_POLL_S)
        return None

    def _fill(self, part: Tensor) -> None:
        self._group.recv([part], _peer_of(self._group), _TAG).wait(_FOREVER)


def _peer_of(group: Pair) -> int:
    return 1 - group.rank()
