"""An ingress' end of a token stream: submits requests to one attention actor, and hands each its own tokens."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio

from actors.token_frames import PROTOCOL_VERSION, Abort, Answer, Submit, decode_answers, decode_hello, encode_order
from actors.token_stream import CHANNEL_OPTIONS, INGRESS_KEY, METHOD, SECRET_KEY, SERVICE, Lost, Outbox, is_last
from afd_ray.request import KVTicket, Request

Answers = asyncio.Queue[Answer | Lost]


class StreamLost(ConnectionError):
    """The stream to an attention actor could not be opened, or broke; the message is one line."""


class _Pending(NamedTuple):
    answers: Answers
    tokens: int
    """What the request may come to, prompt and output, for balancing."""


class TokenStreamClient:
    """The ingress' end of one stream: submits requests, and hands each its own tokens. One event loop only."""

    def __init__(self, channel: grpc.aio.Channel, call: Any, address: str) -> None:
        self.address = address
        self.lost: str | None = None
        """Why the stream is of no use any more."""
        self.outstanding_tokens = 0
        self._channel = channel
        self._call = call
        self._outbox: Outbox[bytes] = Outbox()
        self._pending: dict[str, _Pending] = {}
        self._broken = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))

    @classmethod
    async def connect(cls, address: str, *, secret: bytes, ingress_id: str, timeout_s: float = 10.0) -> "TokenStreamClient":
        """Raises StreamLost when the attention actor cannot be reached in time, or refuses."""
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=((SECRET_KEY, secret), (INGRESS_KEY, ingress_id)))
        try:
            async with asyncio.timeout(timeout_s):
                hello = await call.read()
            if hello is grpc.aio.EOF or decode_hello(hello) != PROTOCOL_VERSION:
                raise StreamLost(f"attention actor at {address} speaks another token stream version")
            return cls(channel, call, address)
        except BaseException as error:
            call.cancel()
            await channel.close()
            if isinstance(error, (grpc.aio.AioRpcError, TimeoutError)):
                raise StreamLost(f"no token stream to the attention actor at {address}: {_why(error)}") from error
            raise

    @property
    def outstanding(self) -> int:
        """Requests in flight."""
        return len(self._pending)

    async def broken(self) -> str:
        """Why the stream broke, as soon as it has."""
        await self._broken.wait()
        return self.lost or ""

    async def idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    def submit(self, request: Request, generated: Sequence[int] = (), ticket: KVTicket | None = None) -> Answers:
        """Sends the request, with the tokens that it has already and where their keys and values are. Its answers arrive in the queue; the last is one that `is_last`."""
        answers: Answers = asyncio.Queue()
        if self.lost is not None:
            answers.put_nowait(Lost(request.id, self.lost))
            return answers
        self._outbox.put([encode_order(Submit(request, tuple(generated), ticket))])
        pending = _Pending(answers, len(request.prompt_token_ids) + (request.params.max_tokens or 0))
        self._pending[request.id] = pending
        self.outstanding_tokens += pending.tokens
        self._idle.clear()
        return answers

    def abort(self, request_id: str) -> None:
        """Forgets a request, and what is still said of it; harmless when it is over."""
        if self._forget(request_id) is not None and self.lost is None:
            self._outbox.put([encode_order(Abort(request_id))])

    async def close(self) -> None:
        """Breaks the stream, which aborts its requests at the actor; they are Lost here. Idempotent."""
        self._fail("the token stream was closed")
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    def _forget(self, request_id: str) -> _Pending | None:
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            self.outstanding_tokens -= pending.tokens
        if not self._pending:
            self._idle.set()
        return pending

    async def _write(self) -> None:
        while True:
            orders = await self._outbox.take()
            try:
                await self._call.write(b"".join(orders))
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the reader hears of it too, and tells why

    async def _read(self) -> None:
        reason = "closed by the attention actor"
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                self._deliver(decode_answers(frame))
        except grpc.aio.AioRpcError as error:
            reason = _why(error)
        self._fail(f"the token stream from {self.address} broke: {reason}")

    def _deliver(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            pending = self._pending.get(answer.request_id)
            if pending is None:
                continue
            pending.answers.put_nowait(answer)
            if is_last(answer):
                self._forget(answer.request_id)

    def _fail(self, reason: str) -> None:
        self.lost = self.lost or reason
        self._broken.set()
        for request_id in list(self._pending):
            pending = self._forget(request_id)
            if pending is not None:
                pending.answers.put_nowait(Lost(request_id, reason))


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details() or 'no details'}"
    return "timed out"
