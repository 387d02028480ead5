"""In Serve's proxy: a request whose ingress replica dies ends as any other failure does, instead of with a connection that breaks.

Every answer has one id there, which Serve would add to that of the ingress.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.http.errors import ApiError
from actors.http.request_id import RequestId
from actors.http.wire import DONE, event

DIED = ApiError(503, "the ingress ended before the answer was over; ask again", code="unavailable", headers={"Retry-After": "1"})


class Guard:
    """ASGI middleware. Where nothing was answered yet, 503; an event stream that has begun gets the error as its last event."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = _Sent(send)
        await self._app(scope, receive, sent)
        if not sent.begun:
            await DIED.response()(scope, receive, send)
        elif sent.events and not sent.over:
            await send({"type": "http.response.body", "body": event(DIED.body()) + DONE, "more_body": False})


class _Sent:
    """How far the answer has come."""

    def __init__(self, send: Send) -> None:
        self.begun = self.events = self.over = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self.events = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self.over = not message.get("more_body", False)
        await self._send(message)


def middlewares() -> list[Middleware]:
    """What Serve's proxy is to put around its own application, innermost first (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`)."""
    return [Middleware(Guard), Middleware(RequestId)]
