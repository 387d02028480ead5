"""One attention actor as an ingress reaches it: a token stream, opened anew whenever it breaks, until it is let go of."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from actors.token_client import TokenStreamClient

logger = logging.getLogger(__name__)

RETRY_S = 0.5
"""From one failed attempt to connect to the next."""

Connect = Callable[[str], Awaitable[TokenStreamClient]]


class AttentionLink:
    """Keeps a stream to the actor at `address`. `on_open` is called whenever there is a new one. One event loop only."""

    def __init__(self, name: str, address: str, connect: Connect, on_open: Callable[[], None]) -> None:
        self.name, self.address = name, address
        self.failure: str | None = None
        """Why the last attempt to connect failed."""
        self._connect, self._on_open = connect, on_open
        self._stream: TokenStreamClient | None = None
        self._tried = asyncio.Event()
        self._stopping = False
        self._task = asyncio.create_task(self._keep())

    @property
    def stream(self) -> TokenStreamClient | None:
        """The stream, while it can take a request."""
        return self._stream if self._stream is not None and self._stream.lost is None else None

    async def tried(self) -> str | None:
        """Waits until a stream is open, or could not be opened; then tells why, or None."""
        await self._tried.wait()
        return self.failure

    async def leave(self) -> None:
        """Closes the stream as soon as nothing is in flight on it, or it breaks. To be called once, instead of `close`."""
        await self._stop()
        if self._stream is not None:
            await _first(self._stream.idle(), self._stream.broken())
            await self._stream.close()

    async def close(self) -> None:
        """Breaks the stream: what is in flight on it is Lost. Idempotent, and ends a `leave` under way."""
        await self._stop()
        if self._stream is not None:
            await self._stream.close()

    async def _stop(self) -> None:
        self._stopping = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        while not self._stopping:  # a cancellation may be lost in the connecting: gRPC swallows some
            try:
                stream = await self._connect(self.address)
            except Exception as error:  # whatever keeps it from the actor, it tries again
                if self._stopping:
                    return
                if self.failure is None:
                    logger.warning("attention actor %s: %s", self.name, error)
                self.failure = str(error)
                self._tried.set()
                await asyncio.sleep(RETRY_S)
                continue
            self._stream, self.failure = stream, None
            self._tried.set()
            if self._stopping:
                return
            self._on_open()
            logger.warning("attention actor %s: %s", self.name, await stream.broken())
            self._tried.clear()
            await stream.close()


async def _first(*waits: Awaitable[object]) -> None:
    """Until one of them is over."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
