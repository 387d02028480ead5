"""The attention actors as one ingress replica sees them: a token stream to each, and which of them takes the next request."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing

from actors.http.backend import Overloaded, Unavailable
from actors.token_stream import StreamLost, TokenStreamClient
from afd_ray.request import Request, TokenOutput

logger = logging.getLogger(__name__)

Connect = Callable[[str], Awaitable[TokenStreamClient]]


class AttentionPool:
    """Routes each request to the actor with the least outstanding work, and refuses requests beyond `max_queued`.

    A request is queued until its first token. One event loop only.
    """

    def __init__(self, connect: Connect, *, max_queued: int) -> None:
        self.broken = asyncio.Event()
        """Set when a stream was lost: whoever follows the cluster should look again."""
        self._connect = connect
        self._max_queued = max_queued
        self._queued = 0
        self._streams: dict[str, TokenStreamClient] = {}
        self._retired: set[TokenStreamClient] = set()

    @property
    def live(self) -> int:
        """Attention actors that can take a request."""
        return sum(stream.lost is None for stream in self._streams.values())

    @property
    def queued(self) -> int:
        return self._queued

    async def follow(self, addresses: Mapping[str, str]) -> list[str]:
        """Connects to what is new among the actors (id to address), and lets go of the others; tells, a line each, what could not be reached.

        A stream let go of takes no new request, and closes when its last one is over.
        """
        self.broken.clear()
        for name, stream in list(self._streams.items()):
            if stream.lost is not None or addresses.get(name) != stream.address:
                self._retired.add(self._streams.pop(name))
        missing = [name for name in addresses if name not in self._streams]
        opened = await asyncio.gather(*(self._connect(addresses[name]) for name in missing), return_exceptions=True)
        failures = []
        for name, stream_or_error in zip(missing, opened, strict=True):
            if isinstance(stream_or_error, TokenStreamClient):
                stream_or_error.on_lost = self.broken.set
                self._streams[name] = stream_or_error
            elif isinstance(stream_or_error, StreamLost):
                failures.append(f"{name}: {stream_or_error}")
            else:
                raise stream_or_error
        await self._close_idle()
        return failures

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """Overloaded when the queue is full, Unavailable when no actor is connected, ValueError when the engine refuses the request."""
        if self._queued >= self._max_queued:
            raise Overloaded(f"the queue is full: {self._queued} requests wait")
        stream = self._least_loaded()
        queued = 1
        self._queued += queued
        try:
            async with aclosing(stream.generate(request)) as outputs:
                async for output in outputs:
                    self._queued -= queued
                    queued = 0
                    yield output
        finally:
            self._queued -= queued
            await self._close_idle()

    async def close(self) -> None:
        self._retired.update(self._streams.values())
        self._streams = {}
        for stream in self._retired:
            await stream.close()
        self._retired.clear()

    def _least_loaded(self) -> TokenStreamClient:
        live = [stream for stream in self._streams.values() if stream.lost is None]
        if not live:
            raise Unavailable("no attention actor is connected")
        return min(live, key=lambda stream: (stream.outstanding, stream.outstanding_tokens))

    async def _close_idle(self) -> None:
        for stream in [stream for stream in self._retired if not stream.outstanding]:
            self._retired.discard(stream)
            await stream.close()
