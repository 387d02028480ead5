"""How the end of an edge is noticed by its receiver, and whom it is told."""

import socket
from collections.abc import Callable

from afd_ray.handoff.intake import Pumped
from afd_ray.handoff.message import LinkError
from afd_ray.handoff.tcp import PEER_CLOSED

_MANY_POKES = 4096


class Life:
    """The connection of a shm edge, as its receiver looks at it: it tells of the peer's end, and a byte on it is a poke."""

    def __init__(self, connection: socket.socket, on_broken: Callable[[str], None]) -> None:
        self.connection = connection
        self._on_broken = on_broken

    @property
    def bulky(self) -> bool:
        return False

    def pump(self) -> Pumped:
        try:
            if self.connection.recv(_MANY_POKES):
                return Pumped.OPEN
            reason = PEER_CLOSED
        except BlockingIOError:
            return Pumped.OPEN
        except OSError as error:
            reason = f"{PEER_CLOSED} ({error.strerror})"
        self._on_broken(reason)
        return Pumped.OVER


class Breaks:
    """Whom to tell of an edge that breaks. It refers to no edge: those refer to it."""

    def __init__(self) -> None:
        self.listener: Callable[[LinkError], None] | None = None

    def tell(self, peer: int, reason: str) -> None:
        if self.listener is not None:
            self.listener(LinkError(peer, reason))
