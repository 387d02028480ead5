"""Sockets across hosts: the edge that sends into one, and the inlet that reads one into a ring."""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor, uint8

from afd_ray.handoff.doorbell import Doorbell
from afd_ray.handoff.message import HEADER_BYTES, Header, LinkError, aligned, layout_for, length_of, pack
from afd_ray.handoff.poller import READ, WRITE, Poller
from afd_ray.handoff.ring import RingMemory, RingWriter

PEER_CLOSED = "closed by the peer"

_PADDING = bytes(64)

OnBroken = Callable[[str], None]


def tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)


def _wire_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(uint8).numpy().data


class TcpEdge:
    """The sending end of a socket edge: what the kernel does not take at once is copied, and sent by the poller."""

    kind = "tcp"

    def __init__(
        self,
        peer: int,
        connection: socket.socket,
        poller: Poller,
        *,
        capacity_bytes: int,
        digest: int,
        send_timeout_s: float,
    ) -> None:
        """`capacity_bytes` is that of the peer's ring: the largest message, and the most that is queued here."""
        self.peer = peer
        self.broken: str | None = None
        self.messages = 0
        self.size_bytes = 0
        self._connection = connection
        self._poller = poller
        self._capacity_bytes = capacity_bytes
        self._digest = digest
        self._send_timeout_s = send_timeout_s
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._room = threading.Condition()

    def send(self, header: Header, tensors: Sequence[Tensor]) -> None:
        layout = layout_for(tensors)
        if layout.length_bytes > self._capacity_bytes:
            raise ValueError(f"message of {layout.length_bytes} bytes to rank {self.peer}: its ring holds {self._capacity_bytes}")
        parts: list[bytes | memoryview] = [pack(header, layout, self._digest)]
        for field, tensor in zip(layout.fields, tensors, strict=True):
            if field.size_bytes:
                parts.append(_wire_bytes(tensor))
                if padding := aligned(field.size_bytes) - field.size_bytes:
                    parts.append(_PADDING[:padding])
        with self._room:
            self._await_room(layout.length_bytes)
            self._write(parts, layout.length_bytes)
        self.messages += 1
        self.size_bytes += layout.length_bytes

    def _await_room(self, length_bytes: int) -> None:
        limit_bytes = self._capacity_bytes
        if not self._room.wait_for(
            lambda: self.broken is not None or self._queued_bytes + length_bytes <= limit_bytes, self._send_timeout_s
        ):
            raise LinkError(self.peer, f"its socket stayed full for {self._send_timeout_s:g} s")
        if self.broken is not None:
            raise LinkError(self.peer, self.broken)

    def _write(self, parts: Sequence[bytes | memoryview], length_bytes: int) -> None:
        sent_bytes = 0
        if not self._queue:
            try:
                sent_bytes = self._connection.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError as error:
                raise LinkError(self.peer, f"{PEER_CLOSED} ({error.strerror})") from None
        if sent_bytes < length_bytes:
            rest = memoryview(b"".join(parts))[sent_bytes:]
            self._queue.append(rest)
            self._queued_bytes += len(rest)
            self._poller.call(self.watch)

    def watch(self) -> None:
        """On the poller's thread: look for the peer's end, and for room while something is queued."""
        with self._room:
            if self.broken is None:
                self._poller.watch(self._connection, READ | WRITE if self._queue else READ, self._on_event)

    def _on_event(self, events: int) -> None:
        if events & READ:
            self._on_readable()
        if events & WRITE and self.broken is None:
            self._flush()

    def _on_readable(self) -> None:
        try:
            reason = PEER_CLOSED if not self._connection.recv(1) else "the peer sent bytes on a one-way edge"
        except BlockingIOError:
            return
        except OSError as error:
            reason = f"{PEER_CLOSED} ({error.strerror})"
        self._poller.forget(self._connection)
        self.fail(reason)

    def _flush(self) -> None:
        with self._room:
            try:
                while self._queue:
                    sent_bytes = self._connection.send(self._queue[0])
                    self._queued_bytes -= sent_bytes
                    if sent_bytes < len(self._queue[0]):
                        self._queue[0] = self._queue[0][sent_bytes:]
                        break
                    self._queue.popleft()
            except OSError:
                pass  # full again; or gone, which the next readable event reports
            self._room.notify_all()
        if not self._queue:
            self.watch()

    def fail(self, reason: str) -> None:
        with self._room:
            self.broken = self.broken or reason
            self._room.notify_all()

    def close(self) -> None:
        """On the poller's thread: what the kernel has not taken within a moment is lost."""
        self._linger()
        self.fail("this mesh is closed")
        self._poller.forget(self._connection)
        self._connection.close()

    def _linger(self) -> None:
        until_s = time.monotonic() + 0.2
        while self._queue and self.broken is None and time.monotonic() < until_s:
            self._flush()
            time.sleep(0.001)


class TcpInlet:
    """Reads one peer's frames from its socket straight into their place in the ring; lives on the poller's thread."""

    def __init__(
        self, connection: socket.socket, memory: RingMemory, doorbell: Doorbell, poller: Poller, on_broken: OnBroken
    ) -> None:
        self._stalled = False
        self._connection = connection
        self._data = memory.data
        self._limit_bytes = memory.capacity_bytes
        self._writer = RingWriter(memory)
        self._doorbell = doorbell
        self._poller = poller
        self._on_broken = on_broken
        self._head = bytearray(HEADER_BYTES)
        self._head_view = memoryview(self._head)
        self._got_bytes = 0
        self._length_bytes = 0
        self._offset: int | None = None

    def watch(self) -> None:
        self._poller.watch(self._connection, READ, self._on_readable)

    def on_free(self) -> None:
        """On the receiver's thread, after it has freed some of the ring."""
        if self._stalled:
            self._poller.call(self._resume)

    def _resume(self) -> None:
        if self._stalled and self._place():
            self._stalled = False
            self.watch()

    def _on_readable(self, _events: int) -> None:
        try:
            if self._got_bytes < HEADER_BYTES:
                self._read_head()
            if self._offset is not None:
                self._read_rest(self._offset)
        except BlockingIOError:
            pass
        except OSError as error:
            self._give_up(f"{PEER_CLOSED} ({error.strerror})")
        except ValueError as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        self._poller.forget(self._connection)
        self._on_broken(reason)

    def _read_head(self) -> None:
        self._receive(self._head_view[self._got_bytes :])
        if self._got_bytes < HEADER_BYTES:
            return
        self._length_bytes = length_of(self._head, self._limit_bytes)
        if not self._place():
            self._poller.forget(self._connection)
            self._stalled = True
            self._resume()  # the reader may have freed bytes just before it could see that

    def _place(self) -> bool:
        self._offset = self._writer.reserve(self._length_bytes)
        if self._offset is None:
            self._doorbell.ring()  # the ring's end may have been skipped, which the reader must pass first
            return False
        self._data[self._offset : self._offset + HEADER_BYTES] = self._head_view
        return True

    def _read_rest(self, offset: int) -> None:
        if self._got_bytes < self._length_bytes:
            self._receive(self._data[offset + self._got_bytes : offset + self._length_bytes])
        if self._got_bytes == self._length_bytes:
            self._writer.publish(self._length_bytes)
            self._doorbell.ring()
            self._got_bytes = 0
            self._offset = None

    def _receive(self, into: memoryview) -> None:
        count = self._connection.recv_into(into)
        if count == 0:
            raise ValueError(PEER_CLOSED)
        self._got_bytes += count
