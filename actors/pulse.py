"""A heartbeat that costs next to nothing: a byte there and back on a connection of its own, answered by the actor's event loop."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from typing import Any

PROOF_BYTES = 32


def _proof(secret: bytes) -> bytes:
    return hmac.digest(secret, b"afd-ray pulse", hashlib.sha256)


class _Answering(asyncio.Protocol):
    """The actor's end of one connection: nothing is answered before the caller has shown that it knows the secret."""

    def __init__(self, secret: bytes, heard: Callable[[], None]) -> None:
        self._expected, self._heard = _proof(secret), heard
        self._shown = b""
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Of any event loop: uvloop's transports are not asyncio's."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        missing = PROOF_BYTES - len(self._shown)
        self._shown += data[:missing]
        if len(self._shown) < PROOF_BYTES:
            return
        if not hmac.compare_digest(self._shown, self._expected):
            self._transport.abort()
            return
        self._heard()
        self._transport.write(data[missing:])


class PulseServer:
    """In an actor."""

    def __init__(self, secret: bytes, heard: Callable[[], None]) -> None:
        """`heard` is called at every beat."""
        self._secret, self._heard = secret, heard
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        """Listens; gives the port. The same again when it listens already."""
        if self._server is None:
            make = asyncio.get_running_loop().create_server
            self._server = await make(lambda: _Answering(self._secret, self._heard), host, 0)
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
