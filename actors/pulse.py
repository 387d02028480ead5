"""A heartbeat that costs next to nothing: a byte there and back on a connection of its own, answered by the actor's event loop."""

import asyncio
import hashlib
import hmac
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from afd_ray.refusals import RefusalLog

logger = logging.getLogger(__name__)

PROOF_BYTES = 32
MOST_UNPROVEN = 64
"""Connections at a time; the one that has waited longest makes room for the next."""


def _proof(secret: bytes) -> bytes:
    return hmac.digest(secret, b"afd-ray pulse", hashlib.sha256)


class _Door:
    """Who has not shown yet that it knows the secret."""

    def __init__(self, secret: bytes) -> None:
        self._expected = _proof(secret)
        self._unproven: OrderedDict[_Answering, None] = OrderedDict()
        self._refusals = RefusalLog(logger)

    def enter(self, caller: "_Answering") -> None:
        self._unproven[caller] = None
        if len(self._unproven) > MOST_UNPROVEN:
            self.turn_away(next(iter(self._unproven)), "it took too long")

    def lets_in(self, caller: "_Answering", shown: bytes) -> bool:
        if not hmac.compare_digest(shown, self._expected):
            self.turn_away(caller, "it does not know the cluster secret")
            return False
        self._unproven.pop(caller, None)
        return True

    def turn_away(self, caller: "_Answering", why: str) -> None:
        """Nothing for one that has been let in, or turned away."""
        if caller in self._unproven:
            del self._unproven[caller]
            self._refusals.add(caller.address, why)
            caller.hang_up()


class _Answering(asyncio.Protocol):
    """The actor's end of one connection: nothing is answered before the caller has shown that it knows the secret."""

    def __init__(self, door: _Door, heard: Callable[[], None]) -> None:
        self._door, self._heard = door, heard
        self._shown, self._proven = b"", False
        self._transport: Any = None

    @property
    def address(self) -> str:
        return ":".join(map(str, (self._transport.get_extra_info("peername") or ("?",))[:2]))

    def connection_made(self, transport: Any) -> None:
        """Of any event loop: uvloop's transports are not asyncio's."""
        self._transport = transport
        self._door.enter(self)

    def data_received(self, data: bytes) -> None:
        if not self._proven:
            missing = PROOF_BYTES - len(self._shown)
            self._shown, data = self._shown + data[:missing], data[missing:]
            self._proven = len(self._shown) == PROOF_BYTES and self._door.lets_in(self, self._shown)
            if not self._proven:
                return
        self._heard()
        self._transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._door.turn_away(self, "it left before it had said who it is")

    def hang_up(self) -> None:
        self._transport.abort()


class PulseServer:
    """In an actor."""

    def __init__(self, secret: bytes, heard: Callable[[], None]) -> None:
        """`heard` is called at every beat."""
        self._door, self._heard = _Door(secret), heard
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        """Listens; gives the port. The same again when it listens already."""
        if self._server is None:
            make = asyncio.get_running_loop().create_server
            self._server = await make(lambda: _Answering(self._door, self._heard), host, 0)
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


class Pulse(asyncio.Protocol):
    """The other end, in whoever watches the actor."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._awaited: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int, secret: bytes) -> "Pulse":
        """Raises OSError when nobody listens there."""
        transport, pulse = await asyncio.get_running_loop().create_connection(cls, host, port)
        transport.write(_proof(secret))
        pulse._transport = transport
        return pulse

    async def beat(self) -> None:
        """Return when the actor has answered. Raises ConnectionError when the connection is over."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the actor has closed the connection")
        self._awaited = asyncio.get_running_loop().create_future()
        self._transport.write(b".")
        await self._awaited

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(ConnectionError("the actor has closed the connection"))
