"""`timeout_s` of a request, and the configured one: what a client hears when it passes, and what is left behind."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from actors.http.app import Options, create_app
from afd_ray.text import Tokenizer
from tests.ingress_fake import FakeBackend, byte_ids, write_tokenizer

SOON_S = 0.02
TIMEOUT_S = 30
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    """It gives no token until its gate lets one pass."""
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path))
    assert tokenizer is not None
    backend = FakeBackend(tokenizer, byte_ids(tokenizer, b"hello world"), end=tokenizer.encode("</s>")[0])
    backend.gate = asyncio.Semaphore(0)
    return backend


@pytest_asyncio.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend, Options()) as client:
        yield client


def client_of(backend: FakeBackend, options: Options) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(backend, options)), base_url="http://x", timeout=TIMEOUT_S)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token_it_is_a_504(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, stream: bool
) -> None:
    body = {"prompt": "hi", "n": 2} if path == "/v1/completions" else CHAT
    response = await client.post(path, json={**body, "stream": stream, "timeout_s": SOON_S})
    assert response.status_code == 504
    assert response.json()["error"] == {
        "message": "the request was not over in timeout_s, 0.02 s", "type": "timeout_error", "param": None, "code": "timeout",
    }  # fmt: skip
    assert (backend.live, len(backend.aborted)) == (set(), len(backend.requests))


async def test_in_a_stream_it_is_an_event(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert backend.gate is not None
    for _ in range(3):
        backend.gate.release()
    response = await client.post("/v1/completions", json={"prompt": "hi", "stream": True, "timeout_s": SOON_S})
    assert response.status_code == 200
    *tokens, last = events(response)
    assert "".join(event["choices"][0]["text"] for event in tokens) == "hel"
    assert last["error"]["code"] == "timeout"
    assert (backend.live, backend.aborted) == (set(), [backend.requests[0].id])


async def test_without_a_stream_nothing_of_the_answer_is_given(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert backend.gate is not None
    backend.gate.release()
    response = await client.post("/v1/completions", json={"prompt": "hi", "timeout_s": SOON_S})
    assert (response.status_code, backend.live) == (504, set())


async def test_the_configured_limit_is_for_requests_without_one(backend: FakeBackend) -> None:
    async with client_of(backend, Options(request_timeout_s=SOON_S)) as client:
        assert (await client.post("/v1/completions", json={"prompt": "hi"})).status_code == 504
        waiting = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "timeout_s": 60}))
        await backend.until(lambda: len(backend.requests) == 2)
        assert backend.gate is not None
        await asyncio.sleep(2 * SOON_S)
        for _ in range(20):
            backend.gate.release()
        assert (await waiting).status_code == 200


async def test_a_request_in_time_is_as_ever(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.gate = None
    response = await client.post("/v1/completions", json={"prompt": "hi", "timeout_s": 60})
    assert response.json()["choices"][0]["text"] == "hello world"


@pytest.mark.parametrize("wrong", [0, -1, "3", True, 1e999])
async def test_it_must_be_a_number_above_0(client: httpx.AsyncClient, wrong: Any) -> None:
    body = json.dumps({"prompt": "hi", "timeout_s": wrong}).replace("Infinity", "1e999")
    response = await client.post("/v1/completions", content=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "timeout_s")


async def test_it_is_counted(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"prompt": "hi", "timeout_s": SOON_S})
    assert 'afd_choices_finished_total{reason="timeout",replica="0"} 1.0' in (await client.get("/metrics")).text
