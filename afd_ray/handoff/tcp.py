"""Sockets across hosts: the edge that sends into one, and the inlet that reads one into a ring."""

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from ctypes import Array, addressof, c_char

from torch import Tensor

from afd_ray.handoff.intake import Pumped
from afd_ray.handoff.message import ALIGNMENT, HEADER_BYTES, Header, Layout, LinkError, layout_for, length_of, pack_into
from afd_ray.handoff.poller import READ, WRITE, Poller
from afd_ray.handoff.ring import RingMemory, RingWriter, copy_tensors

PEER_CLOSED = "closed by the peer"

_PADDING = bytes(ALIGNMENT)
_STAGED_BYTES = 16 << 10
"""Up to here a frame is put together before it is sent: one buffer costs the kernel's interface less than several."""
_BULK_MEMORY = 64
"""Frames for which an inlet stays bulky after one that the kernel could not hold."""
_KEEPALIVE_S = 1
"""The least that the kernel takes."""
_PAUSE_MS = 1
"""How long a send waits for the kernel to take more, each time."""

Buffer = bytes | bytearray | memoryview | Array[c_char]

OnBroken = Callable[[str], None]


def tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)


def notice_silence(connection: socket.socket, limit_s: float) -> None:
    """Break the connection when its peer's kernel has acknowledged nothing for so long; where nothing is sent it takes 1 to 2 s more."""
    for option, value in (
        (socket.TCP_USER_TIMEOUT, max(1, round(limit_s * 1000))),
        (socket.TCP_KEEPIDLE, _KEEPALIVE_S),
        (socket.TCP_KEEPINTVL, _KEEPALIVE_S),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


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
        on_broken: OnBroken,
    ) -> None:
        """`capacity_bytes` is that of the peer's ring: the largest message, and the most that is queued here.

        `on_broken` is called on the poller's thread when that sees the peer's end, whether or not anything is sent.
        """
        self.peer = peer
        self.broken: str | None = None
        self.messages = 0
        self.size_bytes = 0
        self._connection = connection
        self._poller = poller
        self._capacity_bytes = capacity_bytes
        self._digest = digest
        self._send_timeout_s = send_timeout_s
        self._on_broken = on_broken
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._room = threading.Condition()
        self._staging = memoryview(bytearray(_STAGED_BYTES))
        self._staging_address = addressof(c_char.from_buffer(self._staging))
        self._writable = select.poll()
        self._writable.register(connection, select.POLLOUT)

    def send(self, header: Header, tensors: Sequence[Tensor]) -> None:
        layout = layout_for(tensors)
        if layout.length_bytes > self._capacity_bytes:
            raise ValueError(f"message of {layout.length_bytes} bytes to rank {self.peer}: its ring holds {self._capacity_bytes}")
        pack_into(self._staging, 0, header, layout, self._digest)
        if layout.length_bytes <= _STAGED_BYTES:
            copy_tensors(self._staging_address, layout, tensors)
            self._send([self._staging[: layout.length_bytes]], layout.length_bytes)
        else:
            sources = [tensor if tensor.is_contiguous() and tensor.is_cpu else tensor.cpu().contiguous() for tensor in tensors]
            self._send(self._gather(layout, sources), layout.length_bytes)
        self.messages += 1
        self.size_bytes += layout.length_bytes

    def _gather(self, layout: Layout, sources: Sequence[Tensor]) -> list[Buffer]:
        """The frame's parts where they lie; `sources` must outlive them."""
        parts: list[Buffer] = [self._staging[:HEADER_BYTES]]
        for field, source in zip(layout.fields, sources, strict=True):
            if field.size_bytes:
                parts.append((c_char * field.size_bytes).from_address(source.data_ptr()))
            if field.size_bytes % ALIGNMENT:
                parts.append(_PADDING[field.size_bytes % ALIGNMENT :])
        return parts

    def _send(self, parts: list[Buffer], length_bytes: int) -> None:
        with self._room:
            if self.broken is not None or self._queue:
                self._await_room(length_bytes)
            self._write(parts, length_bytes)

    def _await_room(self, length_bytes: int) -> None:
        limit_bytes = self._capacity_bytes
        if not self._room.wait_for(
            lambda: self.broken is not None or self._queued_bytes + length_bytes <= limit_bytes, self._send_timeout_s
        ):
            raise LinkError(self.peer, f"its socket stayed full for {self._send_timeout_s:g} s")
        if self.broken is not None:
            raise LinkError(self.peer, self.broken)

    def _write(self, parts: list[Buffer], length_bytes: int) -> None:
        """Give the kernel what it takes; the rest goes on while the peer reads, and is queued once it pauses."""
        sent_bytes = 0 if self._queue else self._try_send(parts)
        if sent_bytes == length_bytes:
            return
        rest = unsent([memoryview(part).cast("B") for part in parts], sent_bytes)
        while rest and not self._queue and self._writable.poll(_PAUSE_MS):
            rest = unsent(rest, self._try_send(rest))
        if rest:
            queued = memoryview(b"".join(rest))
            self._queue.append(queued)
            self._queued_bytes += len(queued)
            self._poller.call(self.watch)

    def _try_send(self, parts: Sequence[Buffer]) -> int:
        try:
            return self._connection.sendmsg(parts)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkError(self.peer, f"{PEER_CLOSED} ({error.strerror})") from None

    def watch(self) -> None:
        """On the poller's thread: look for the peer's end, and for room while something is queued."""
        with self._room:
            if self.broken is None:
                self._poller.watch(self._connection, READ | WRITE if self._queue else READ, self._on_event)

    def _on_event(self, events: int) -> None:
        if events & ~WRITE:
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
        self._on_broken(reason)

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


def unsent(parts: list[memoryview], sent_bytes: int) -> list[memoryview]:
    """What is left of the parts once that many bytes of them are sent."""
    for index, part in enumerate(parts):
        if sent_bytes < len(part):
            return [part[sent_bytes:], *parts[index + 1 :]]
        sent_bytes -= len(part)
    return []


class TcpInlet:
    """Reads one peer's frames from its socket straight into the ring that its messages are read from.

    Frames follow each other in the stream as they do in the ring, so one read may bring many. Where the ring ends within a
    frame, what has come of it moves to the ring's start.
    """

    def __init__(self, connection: socket.socket, memory: RingMemory, on_broken: OnBroken) -> None:
        self.connection = connection
        self._data = memory.data
        self._limit_bytes = memory.capacity_bytes
        self._writer = RingWriter(memory)
        self._on_broken = on_broken
        self._begun_bytes = 0
        """Of the frame at the writer's offset, or, where it cannot go on there, in `_aside`."""
        self._length_bytes = HEADER_BYTES
        """Of that frame, as far as is known."""
        self._aside: bytes | None = None
        self._kernel_bytes = connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        self._since_bulk = _BULK_MEMORY

    @property
    def bulky(self) -> bool:
        return self._since_bulk < _BULK_MEMORY

    def pump(self) -> Pumped:
        """Take what has arrived; calls `on_broken` when the connection is over."""
        try:
            return self._read()
        except BlockingIOError:
            return Pumped.OPEN
        except OSError as error:
            self._on_broken(f"{PEER_CLOSED} ({error.strerror})")
        except ValueError as error:
            self._on_broken(str(error))
        return Pumped.OVER

    def _read(self) -> Pumped:
        if not self._make_room():
            return Pumped.FULL
        writer = self._writer
        room = writer.free_bytes() if self._length_bytes == HEADER_BYTES else self._length_bytes
        count = self.connection.recv_into(self._data[writer.offset + self._begun_bytes : writer.offset + room])
        if count == 0:
            raise ValueError(PEER_CLOSED)
        self._begun_bytes += count
        self._publish_whole_frames()
        return Pumped.OPEN

    def _make_room(self) -> bool:
        """Whether the frame that has begun, or the next one's header, has its bytes of the ring."""
        writer = self._writer
        if self._begun_bytes and self._aside is None:
            if writer.offset + self._length_bytes <= self._limit_bytes:
                return writer.free_bytes() >= self._length_bytes
            self._aside = bytes(self._data[writer.offset : writer.offset + self._begun_bytes])
        offset = writer.reserve(self._length_bytes)
        if offset is None:
            return False
        if self._aside is not None:
            self._data[offset : offset + self._begun_bytes] = self._aside
            self._aside = None
        return True

    def _publish_whole_frames(self) -> None:
        writer = self._writer
        while self._begun_bytes >= HEADER_BYTES:
            self._length_bytes = length_of(self._data, writer.offset, self._limit_bytes)
            if self._begun_bytes < self._length_bytes:
                return
            self._since_bulk = 0 if self._length_bytes > self._kernel_bytes else self._since_bulk + 1
            writer.publish(self._length_bytes)
            self._begun_bytes -= self._length_bytes
        self._length_bytes = HEADER_BYTES
