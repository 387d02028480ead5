"""The attention actor's end of its token streams: takes requests from ingress replicas, and sends each its tokens."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from actors.request_log import requests
from actors.token_frames import Answer, Moved, Refused, Submit, decode_orders, encode_answers, encode_hello
from actors.token_stream import CHANNEL_OPTIONS, INGRESS_KEY, METHOD, SECRET_KEY, SERVICE, Outbox, is_last
from afd_ray.refusals import RefusalLog
from afd_ray.request import KVTicket, Request, TokenOutput

logger = logging.getLogger(__name__)

SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
)


class _Subscriber:
    """One ingress replica's stream, seen from the attention actor."""

    def __init__(self, ingress_id: str) -> None:
        self.ingress_id = ingress_id
        self.outbox: Outbox[Answer] = Outbox()
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
                self._end(output)
        for subscriber, batch in batches.items():
            subscriber.outbox.put(batch)

    def _end(self, last: Answer) -> None:
        requests.info("%s %s", last.request_id, _ending(last))
        self._forget(last.request_id)

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
                self._decline(subscriber, order)
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
            self._decline(subscriber, Refused(request_id, str(error)))
        except Exception as error:
            if not isinstance(error, RuntimeError):
                logger.exception("request %s could not be submitted", request_id)
            self._decline(subscriber, Moved(request_id, f"the engine did not take the request: {error}"))

    def _decline(self, subscriber: _Subscriber, answer: Refused | Moved) -> None:
        self._end(answer)
        subscriber.outbox.put([answer])

    def _detach(self, subscriber: _Subscriber) -> None:
        self._streams.discard(subscriber)
        for request_id in list(subscriber.requests):
            requests.info("%s is aborted: the stream of %s is over", request_id, subscriber.ingress_id)
            self._forget(request_id)
            self._abort(request_id)


def _ending(answer: Answer) -> str:
    match answer:
        case TokenOutput():
            return f"ends here ({answer.finish_reason})"
        case Refused():
            return f"is refused: {answer.reason}"
    return f"is given back: {answer.failure or 'this actor leaves'}"


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
