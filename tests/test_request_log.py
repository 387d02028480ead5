"""A request's path can be followed by its id: the one its client gave it, or the one it is told."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio

from actors.course import Course
from actors.http.request_id import ALLOWED
from actors.request_log import requests
from actors.token_client import Answers, TokenStreamClient
from actors.token_frames import Moved
from actors.token_server import TokenStreamServer
from afd_ray.request import Request, SamplingParams, TokenOutput
from tests.ingress_fake import FakeBackend, connected
from tests.live_server import LiveServer, until

PROMPT = {"prompt": [1, 2], "max_tokens": 3}
LONG = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(None, [5, 6, 7])


@pytest_asyncio.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with connected(backend) as client:
        yield client


async def test_a_client_names_its_request(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for _ in range(2):
        response = await client.post("/v1/completions", json=PROMPT, headers={"X-Request-Id": "order-17"})
        assert response.headers["x-request-id"] == "order-17"
        assert response.json()["id"].startswith("cmpl-order-17-")
    first, second = (request.id for request in backend.requests)
    assert first != second, "one that is repeated is another request"
    assert "order-17" in first


@pytest.mark.parametrize("given", ["", "two words", "x" * 65, "line\tbreak", "é"])
async def test_a_name_that_is_no_word_is_replaced(client: httpx.AsyncClient, backend: FakeBackend, given: str) -> None:
    response = await client.post("/v1/completions", json=PROMPT, headers={"X-Request-Id": given.encode()})
    own = response.headers["x-request-id"]
    assert own != given
    assert own in backend.requests[0].id


async def test_a_refusal_has_a_name_too(client: httpx.AsyncClient) -> None:
    for path in ("/v1/completions", "/nowhere"):
        response = await client.post(path, json={}, headers={"X-Request-Id": "mine"})
        assert (response.status_code >= 400, response.headers["x-request-id"]) == (True, "mine")


async def test_a_failure_that_nobody_expected_has_a_name_too(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.failure = RuntimeError("planted")
    response = await client.post("/v1/completions", json=PROMPT, headers={"X-Request-Id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")


class Leaving:
    """A stream to an actor that gives the request back after a token."""

    address = "10.0.0.1:5"

    def submit(self, request: Request, *given: Any) -> Answers:
        answers: Answers = asyncio.Queue()
        answers.put_nowait(TokenOutput(request.id, 7))
        answers.put_nowait(Moved(request.id))
        return answers

    def abort(self, request_id: str) -> None:
        pass


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Of requests, though an actor in this process may have kept their lines to itself."""
    monkeypatch.setattr(requests, "propagate", True)
    caplog.set_level(logging.INFO, requests.name)
    return caplog


async def test_each_actor_that_has_it_is_told(log: pytest.LogCaptureFixture) -> None:
    course, stream = Course(Request("mine", (1, 2), SamplingParams(max_tokens=2))), cast(TokenStreamClient, Leaving())
    with course.logged():
        for _ in range(2):
            assert [output.token_id async for output in course.attempt(stream)] == [7]
    assert log.messages == [
        "mine goes to 10.0.0.1:5 after 0 tokens",
        "mine is back after 1 tokens: its attention actor leaves",
        "mine~2 goes to 10.0.0.1:5 after 1 tokens",
        "mine is back after 2 tokens: its attention actor leaves",
        "mine is over after 2 tokens",
    ]


async def test_an_actor_that_does_not_take_it_says_so(log: pytest.LogCaptureFixture) -> None:
    def submit(*order: Any) -> None:
        raise ValueError("prompt must fit the KV cache")

    server = TokenStreamServer(submit, lambda request_id: None, secret=b"s")
    client = await TokenStreamClient.connect(f"127.0.0.1:{await server.start()}", secret=b"s", ingress_id="i")
    await client.submit(Request("mine", (1, 2))).get()
    await client.close()
    await server.close()
    assert log.messages == [
        "mine comes from i with a prompt of 2 tokens, after 0",
        "mine is refused: prompt must fit the KV cache",
    ]


@pytest.mark.ray
@pytest.mark.parametrize("given", ["asked", "two words", None])
def test_an_answer_has_one_name_though_serve_gives_it_one_too(live: LiveServer, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    (name,) = live.http.get("/health", headers=headers).headers.get_list("x-request-id")
    assert ALLOWED.fullmatch(name)
    assert (name == given) == (given == "asked")


@pytest.mark.ray
def test_the_log_files_tell_a_request_from_its_start_to_its_end(live: LiveServer) -> None:
    named = {"X-Request-Id": "asked"}
    assert live.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}, headers=named).is_success
    with live.http.stream("POST", "/v1/completions", json=LONG, headers={"X-Request-Id": "given-up"}) as response:
        next(response.iter_lines())
    until(lambda: len(told(live, "cmpl-given-up-")) == 4)
    assert told(live, "cmpl-asked-") == {"goes to", "comes from", "ends here", "is over"}
    assert told(live, "cmpl-given-up-") == {"goes to", "comes from", "is given", "is aborted"}


def told(live: LiveServer, name: str) -> set[str]:
    """What the log files of the server's processes say of it: two words of each line. Those of two processes may bear the same millisecond."""
    files = {Path(f"/proc/{process.pid}/fd/2").resolve() for process in live.processes()}
    lines = [line for file in files if file.is_file() for line in file.read_text(errors="replace").splitlines()]
    return {" ".join(line.partition("-0 ")[2].split()[:2]) for line in lines if name in line}
