"""Tokens from an attention actor to an ingress replica: one multiplexed gRPC stream each, a batch a step."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import grpc
import grpc.aio

from actors.request_log import requests
from actors.token_frames import (
    PROTOCOL_VERSION,
    Abort,
    Answer,
    Moved,
    Refused,
    Submit,
    decode_answers,
    decode_hello,
    decode_orders,
    encode_answers,
    encode_hello,
    encode_order,
)
from afd_ray.refusals import RefusalLog
from afd_ray.request import KVTicket, Request, TokenOutput

T = TypeVar("T")
logger = logging.getLogger(__name__)

SERVICE = "afd.TokenStream"
METHOD = "Attach"
SECRET_KEY = "afd-secret-bin"
INGRESS_KEY = "afd-ingress-id"

# A ping every 30 s on an otherwise silent stream: a peer whose host vanished is noticed, and an idle pair costs nothing measurable.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
)


class StreamLost(ConnectionError):
    """The stream to an attention actor could not be opened, or broke; the message is one line."""


class _Outbox(Generic[T]):
    """What waits to be written on one stream; the writer takes all of it at once, so a slow peer gets larger batches."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._filled = asyncio.Event()

    def put(self, items: Sequence[T]) -> None:
        self._items.extend(items)
        self._filled.set()

    async def take(self) -> list[T]:
        await self._filled.wait()
        items, self._items = self._items, []
        self._filled.clear()
        return items


class _Subscriber:
    """One ingress replica's stream, seen from the attention actor."""

    def __init__(self, ingress_id: str) -> None:
        self.ingress_id = ingress_id
        self.outbox: _Outbox[Answer] = _Outbox()
        self.requests: set[str] = set()

    async def write_to(self, context: Any) -> None:
        while True:
            await context.write(encode_answers(await self.outbox.take()))


class TokenStreamServer:
    """Hosted in an attention actor: takes requests from ingress streams, and sends each its tokens.

    `submit` takes a request, the tokens that it has already and where their keys and values are; it and `abort` are called on the event loop that ran `start`, and must return
    at once. `submit` raises ValueError (one line) for a request that can never run, RuntimeError (one line) when this actor cannot run any: such a
    request goes back to its ingress, to go on elsewhere. `publish` may be called from any thread. When a stream breaks, its requests are aborted.
    """

    def __init__(
        self,
        submit: Callable[[Request, tuple[int, ...], KVTicket | None], None],
        abort: Callable[[str], object],
        *,
        secret: bytes,
        host: str = "127.0.0.1",
    ):
        self._submit = submit
        self._abort = abort
        self._secret = secret
        self._host = host
        self._routes: dict[str, _Subscriber] = {}
        self._streams: set[_Subscriber] = set()
        self._server: grpc.aio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._refusals = RefusalLog(logger)

    @property
    def requests(self) -> int:
        """Requests that an ingress still waits for."""
        return len(self._routes)

    @property
    def streams(self) -> int:
        return len(self._streams)

    async def start(self) -> int:
        """Listens; returns the bound port."""
        self._loop = asyncio.get_running_loop()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._attach)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        port = int(self._server.add_insecure_port(f"{self._host}:0"))
        await self._server.start()
        return port

    async def close(self) -> None:
        """Breaks every stream at once; idempotent."""
        server, self._server, self._loop = self._server, None, None
        if server is not None:
            await server.stop(None)

    def refuse(self, request_id: str, reason: str) -> None:
        """For a request that `submit` accepted and that turns out never to be able to run; from any thread."""
        self.publish([Refused(request_id, reason)])

    def move(self, request_ids: Iterable[str], failure: str = "") -> None:
        """Gives these requests back to their ingress, to go on elsewhere; from any thread. `failure`: one line, where this actor has failed."""
        self.publish([Moved(request_id, failure) for request_id in request_ids])

    def hand_over(self, tickets: Mapping[str, KVTicket | None]) -> None:
        """`move` of requests whose keys and values others may fetch."""
        self.publish([Moved(request_id, ticket=ticket) for request_id, ticket in tickets.items()])

    def publish(self, outputs: Sequence[Answer]) -> None:
        """Sends each output to the stream that submitted its request; drops those whose stream is gone."""
        loop = self._loop
        if loop is None or not outputs:
            return
        try:
            loop.call_soon_threadsafe(self._route, outputs)
        except RuntimeError:
            logger.debug("token stream closed; %d outputs dropped", len(outputs))

    def move_all(self, failure: str = "") -> None:
        """`move` for every request that an ingress still waits for; on the event loop only."""
        self._route([Moved(request_id, failure) for request_id in list(self._routes)])

    def _route(self, outputs: Sequence[Answer]) -> None:
        batches: dict[_Subscriber, list[Answer]] = {}
        for output in outputs:
            subscriber = self._routes.get(output.request_id)
            if subscriber is None:
                continue
            batches.setdefault(subscriber, []).append(output)
            if is_last(output):
                requests.info("%s %s", output.request_id, _ending(output))
                self._forget(output.request_id)
        for subscriber, batch in batches.items():
            subscriber.outbox.put(batch)

    def _forget(self, request_id: str) -> None:
        subscriber = self._routes.pop(request_id, None)
        if subscriber is not None:
            subscriber.requests.discard(request_id)

    async def _attach(self, frames: AsyncIterator[bytes], context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        if not hmac.compare_digest(_as_bytes(metadata.get(SECRET_KEY, b"")), self._secret):
            self._refusals.add(context.peer(), "it does not know the cluster secret")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token stream secret")
        subscriber = _Subscriber(str(metadata.get(INGRESS_KEY, "?")))
        self._streams.add(subscriber)
        await context.write(encode_hello())
        writer = asyncio.create_task(subscriber.write_to(context))
        try:
            async for frame in frames:
                self._obey(subscriber, frame)
        except asyncio.CancelledError:
            pass  # the stream broke: the usual end, and gRPC would log it as a failure
        finally:
            writer.cancel()
            self._detach(subscriber)

    def _obey(self, subscriber: _Subscriber, frame: bytes) -> None:
        for order in decode_orders(frame):
            if isinstance(order, Submit):
                self._admit(subscriber, order)
            elif isinstance(order, Refused):
                subscriber.outbox.put([order])
            elif order.request_id in subscriber.requests:
                requests.info("%s is aborted by its ingress", order.request_id)
                self._forget(order.request_id)
                self._abort(order.request_id)

    def _admit(self, subscriber: _Subscriber, order: Submit) -> None:
        request_id = order.request.id
        self._routes[request_id] = subscriber
        subscriber.requests.add(request_id)
        given = len(order.request.prompt_token_ids), len(order.generated)
        requests.info("%s comes from %s with a prompt of %d tokens, after %d", request_id, subscriber.ingress_id, *given)
        try:
            self._submit(order.request, order.generated, order.ticket)
        except ValueError as error:
            self._forget(request_id)
            subscriber.outbox.put([Refused(request_id, str(error))])
        except Exception as error:
            if not isinstance(error, RuntimeError):
                logger.exception("request %s could not be submitted", request_id)
            self._forget(request_id)
            subscriber.outbox.put([Moved(request_id, f"the engine did not take the request: {error}")])

    def _detach(self, subscriber: _Subscriber) -> None:
        self._streams.discard(subscriber)
        for request_id in list(subscriber.requests):
            requests.info("%s is aborted: the stream of %s is over", request_id, subscriber.ingress_id)
            self._forget(request_id)
            self._abort(request_id)


class Lost(NamedTuple):
    """The stream broke under the request; what the actor has done for it since the last token is not known."""

    request_id: str
    reason: str


Answers = asyncio.Queue[Answer | Lost]


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
        self._outbox: _Outbox[bytes] = _Outbox()
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


def is_last(answer: Answer | Lost) -> bool:
    """Whether nothing more is said of the request after this."""
    return not isinstance(answer, TokenOutput) or answer.finish_reason is not None


def _ending(answer: Answer) -> str:
    match answer:
        case TokenOutput():
            return f"ends here ({answer.finish_reason})"
        case Refused():
            return f"is refused: {answer.reason}"
    return f"is given back: {answer.failure or 'this actor leaves'}"


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details() or 'no details'}"
    return "timed out"
