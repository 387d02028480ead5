"""The receiving end of an edge: a ring, and the checks that its frames pass before they are messages."""

from afd_ray.handoff.message import LinkError, Message, unpack_from
from afd_ray.handoff.ring import RingMemory, RingReader


class Inbound:
    """One peer's messages; `kind` is empty until the peer has connected."""

    def __init__(self, peer: int, memory: RingMemory, epoch: int, digest: int) -> None:
        self.peer = peer
        self.memory = memory
        self.reader = RingReader(memory)
        self.kind = ""
        self.broken: str | None = None
        self.messages = 0
        self.size_bytes = 0
        self.stale_messages = 0
        self._data = memory.data
        self._epoch = epoch
        self._digest = digest

    def receive(self) -> Message | None:
        """The next message of this epoch that lies in the ring; LinkError when what lies there is none of this edge."""
        reader = self.reader
        while (offset := reader.peek()) is not None:
            try:
                prefix, header = unpack_from(self._data, offset, self._digest)
                if header.source != self.peer:
                    raise ValueError(f"frame claims to come from rank {header.source}")
                tensors, length_bytes = reader.contents(offset, prefix)
                release = reader.take(length_bytes)
            except ValueError as error:
                self.broken = str(error)
                raise LinkError(self.peer, str(error)) from None
            self.messages += 1
            self.size_bytes += length_bytes
            if header.epoch == self._epoch:
                return tuple.__new__(Message, (header, tensors, release, None))
            self.stale_messages += 1
            release()
        return None
