"""What a client of Serve's proxy hears when the replica dies under its request."""

from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from actors.http.guard import Guard, middlewares
from actors.http.request_id import RequestId
from actors.http.wire import DONE, event

START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
WHOLE: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
TOKEN: Message = {"type": "http.response.body", "body": event({"token": 7}), "more_body": True}
END: Message = {"type": "http.response.body", "body": b"", "more_body": False}


async def heard(*said: Message, kind: str = "http") -> list[Message]:
    """What reaches the client when the application says this and then ends."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in said:
            await send(message)

    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError("nobody asks for the body")

    await Guard(app)({"type": kind, "headers": []}, receive, send)
    return messages


def test_serve_is_given_it_within_what_names_every_answer() -> None:
    assert [middleware.cls for middleware in middlewares()] == [Guard, RequestId]


async def test_without_an_answer_the_client_is_told_to_ask_again() -> None:
    start, body = await heard()
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert b'"code":"unavailable"' in body["body"]


async def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    *before, last = await heard(START, TOKEN)
    assert before == [START, TOKEN]
    assert last["body"].startswith(b'data: {"error":{"message":"the ingress ended')
    assert last["body"].endswith(DONE)
    assert last["more_body"] is False


@pytest.mark.parametrize("said", [(START, TOKEN, END), (WHOLE, END)], ids=["stream", "whole"])
async def test_an_answer_that_is_over_is_left_alone(said: tuple[Message, ...]) -> None:
    assert await heard(*said) == list(said)


async def test_half_a_document_is_not_mended() -> None:
    """The connection breaks: that is how the client learns of it."""
    assert await heard(WHOLE, TOKEN) == [WHOLE, TOKEN]


async def test_other_than_http_passes() -> None:
    assert await heard(END, kind="websocket") == [END]
