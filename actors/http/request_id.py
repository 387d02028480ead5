"""What a request is called, in its answer and in the logs: as its client says, or as drawn here."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
ALLOWED = re.compile(r"[A-Za-z0-9._:-]{1,64}")
"""So that it is one word of a log line."""


class RequestId:
    """ASGI middleware: puts the id into `request.state.id`, and alone into the header of request and answer. One that is not ALLOWED is replaced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if ALLOWED.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = request_id
        MutableHeaders(scope=scope)[HEADER] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, named)
