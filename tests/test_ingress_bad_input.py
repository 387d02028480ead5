"""Bad input over HTTP: an OpenAI error object with the right status, and the server goes on serving."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from actors.http.app import Options
from actors.http.auth import Keys
from actors.http.backend import Overloaded, Unavailable
from afd_ray.text import Tokenizer
from tests.ingress_fake import MAX_CONTEXT, VOCAB_SIZE, FakeBackend, byte_ids, connected, write_tokenizer


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path))
    assert tokenizer is not None
    return FakeBackend(tokenizer, byte_ids(tokenizer, b"hello"), end=tokenizer.encode("</s>")[0])


@pytest_asyncio.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with connected(backend) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


BAD_COMPLETIONS: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b'{"prompt": "\xff"}', None),
    (b"[" * 100_000, None),
    (b"{}", "prompt"),
    (b'{"prompt": null}', "prompt"),
    (b'{"prompt": ""}', "prompt"),
    (b'{"prompt": []}', "prompt"),
    (b'{"prompt": [""]}', "prompt"),
    (b'{"prompt": ["a", ""]}', "prompt"),
    (b'{"prompt": [[1], []]}', "prompt"),
    (b'{"prompt": [1, "a"]}', "prompt"),
    (b'{"prompt": ["a", [1]]}', "prompt"),
    (b'{"prompt": [true]}', "prompt"),
    (b'{"prompt": [1.0]}', "prompt"),
    (b'{"prompt": {"a": 1}}', "prompt"),
    (b'{"prompt": "\\ud800"}', "prompt"),
    (b'{"prompt": "x", "stop": "\\ud800"}', "stop"),
    (b'{"prompt": [-1]}', "prompt"),
    (b'{"prompt": [%d]}' % VOCAB_SIZE, "prompt"),
    (b'{"prompt": [1%s]}' % (b"0" * 30), "prompt"),
    (b'{"prompt": "x", "max_tokens": 0}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": -1}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": true}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": 1.5}', "max_tokens"),
    (b'{"prompt": "x", "temperature": NaN}', None),
    (b'{"prompt": "x", "temperature": -Infinity}', None),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "x", "temperature": -1}', "temperature"),
    (b'{"prompt": "x", "temperature": "hot"}', "temperature"),
    (b'{"prompt": "x", "temperature": true}', "temperature"),
    (b'{"prompt": "x", "top_p": 0}', "top_p"),
    (b'{"prompt": "x", "top_p": 1.5}', "top_p"),
    (b'{"prompt": "x", "top_k": -2}', "top_k"),
    (b'{"prompt": "x", "min_p": 2}', "min_p"),
    (b'{"prompt": "x", "repetition_penalty": 0}', "repetition_penalty"),
    (b'{"prompt": "x", "presence_penalty": 3}', "presence_penalty"),
    (b'{"prompt": "x", "frequency_penalty": -3}', "frequency_penalty"),
    (b'{"prompt": "x", "seed": 1%s}' % (b"0" * 30), "seed"),
    (b'{"prompt": "x", "stop": [1]}', "stop"),
    (b'{"prompt": "x", "stop": ""}', "stop"),
    (b'{"prompt": "x", "stop_token_ids": [1%s]}' % (b"0" * 30), "stop_token_ids"),
    (b'{"prompt": "x", "logprobs": 21}', "logprobs"),
    (b'{"prompt": "x", "logprobs": true}', "logprobs"),
    (b'{"prompt": "x", "n": 0}', "n"),
    (b'{"prompt": "x", "n": 1000000000}', "n"),
    (b'{"prompt": "x", "stream": "yes"}', "stream"),
    (b'{"prompt": "x", "stream_options": {"include_usage": true}}', "stream_options"),
    (b'{"prompt": "x", "echo": true}', "echo"),
    (b'{"prompt": "x", "model": 5}', "model"),
]


@pytest.mark.parametrize(("body", "param"), BAD_COMPLETIONS)
async def test_bad_completion_bodies(client: httpx.AsyncClient, backend: FakeBackend, body: bytes, param: str | None) -> None:
    response = await client.post("/v1/completions", content=body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert backend.requests == []


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages"),  # the template refuses it
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "hi"}], "logprobs": 1}, "logprobs"),
    ({"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHATS)
async def test_bad_chat_bodies(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await client.post("/v1/chat/completions", json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"),
    [([1] * (MAX_CONTEXT + 1), 1, "prompt"), ([1] * MAX_CONTEXT, 1, "prompt"), ([1] * 10, MAX_CONTEXT, "max_tokens")],
)
async def test_context_length_exceeded(client: httpx.AsyncClient, prompt: list[int], max_tokens: int, param: str) -> None:
    response = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": max_tokens})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


async def test_chat_over_the_context(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 100}]})
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "unknown_route"),
        ("POST", "/v1/completions/", 404, "unknown_route"),
        ("GET", "/v1/embeddings", 404, "unknown_route"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_unknown_routes_and_methods(client: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    response = await client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


@pytest.mark.parametrize("name", ["other", "\ud800"])
async def test_unknown_model(client: httpx.AsyncClient, name: str) -> None:
    body = b'{"prompt": "x", "model": "%s"}' % name.encode(errors="backslashreplace")
    response = await client.post("/v1/completions", content=body)
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("declared", [True, False])
async def test_a_large_body_is_refused_before_it_is_read(client: httpx.AsyncClient, declared: bool) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(2000):
            sent += 1000
            yield b"x" * 1000

    headers = {"content-length": "2000000"} if declared else {}
    response = await client.post("/v1/completions", content=pieces(), headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    assert sent <= (0 if declared else 1_050_000)


async def test_a_model_without_tokenizer_serves_token_ids_only() -> None:
    backend = FakeBackend(None, [5, 6])
    async with connected(backend) as client:
        text = await client.post("/v1/completions", json={"prompt": "hi"})
        chat = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        ids = await client.post("/v1/completions", json={"prompt": [1, 2], "return_token_ids": True, "logprobs": 1})
    assert (text.status_code, chat.status_code, ids.status_code) == (400, 400, 200)
    assert "token ids" in error_of(text)["message"]
    (choice,) = ids.json()["choices"]
    assert (choice["text"], choice["token_ids"], choice["logprobs"]["tokens"][0]) == ("", [5, 6, 0], "token_id:5")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (Overloaded("the queue is full", retry_after_s=3), 429, "rate_limit_error"),
        (Unavailable("no attention actor is connected"), 503, "server_error"),
        (ValueError("prompt must fit the KV cache"), 400, "invalid_request_error"),
        (RuntimeError("secret detail"), 500, "server_error"),
    ],
)
async def test_backend_failures(
    client: httpx.AsyncClient, backend: FakeBackend, failure: Exception, status: int, kind: str, stream: bool
) -> None:
    backend.failure = failure
    response = await client.post("/v1/completions", json={"prompt": "x", "stream": stream})
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, kind)
    assert response.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)
    assert "secret detail" not in error["message"]
    backend.failure = None
    assert (await client.post("/v1/completions", json={"prompt": "x", "stream": stream})).status_code == 200
    assert backend.live == set()


async def test_not_ready(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.is_ready = False
    ready, health = await client.get("/ready"), await client.get("/health")
    assert (ready.status_code, health.status_code) == (503, 200)
    error_of(ready)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/admin/scale", b"{}", "body must give attention"),
        ("/admin/scale", b'{"attention": "2"}', 'attention must be an integer from 1 to 4096, got "2"'),
        ("/admin/scale", b'{"attention": 0}', "from 1 to 4096, got 0"),
        ("/admin/scale", b'{"attention": 4097}', "from 1 to 4096, got 4097"),
        ("/admin/scale", b'{"ffn": true}', "from 1 to 4096, got true"),
        ("/admin/scale", b'{"timeout": -1, "attention": 1}', "timeout: unknown key, did you mean timeout_s?"),
        ("/admin/scale", b'{"cancel": false}', "cancel must be true, got false"),
        ("/admin/scale", b'{"cancel": true, "ffn": 1}', "cancel must stand alone"),
        ("/admin/scale", b'{"attention": 1, "timeout_s": 86401}', "timeout_s must be an integer from 1 to 86400"),
        ("/admin/rebalance", b'{"now": 1}', "now: unknown key, the body takes none"),
        ("/admin/trace", b'{"steps": -1}', "from 1 to 10000"),
        ("/admin/trace", b'{"setps": 1}', "setps: unknown key, did you mean steps?"),
        ("/admin/trace", b"nope", "valid JSON"),
    ],
)
async def test_bad_admin_bodies(client: httpx.AsyncClient, path: str, body: bytes, said: str) -> None:
    response = await client.post(path, content=body)
    assert response.status_code == 400
    assert said in error_of(response)["message"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("after=-1", 'after must be the number of a decision, got "-1"'),
        (f"after={'9' * 5000}", "after must be the number of a decision"),
        ("afer=1", "afer: unknown key, did you mean after?"),
    ],
)
async def test_bad_questions_about_decisions(client: httpx.AsyncClient, query: str, said: str) -> None:
    response = await client.get(f"/admin/decisions?{query}")
    assert response.status_code == 400
    assert said in error_of(response)["message"]


async def test_a_resize_that_did_not_happen_is_no_success(
    client: httpx.AsyncClient, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize = {"from": {"attention": 1}, "to": {"attention": 1000}, "outcome": "rolled_back", "reason": "no room"}

    async def scale(wanted: dict[str, Any]) -> dict[str, Any]:
        return resize

    monkeypatch.setattr(backend, "scale", scale)
    response = await client.post("/admin/scale", json={"attention": 1000})
    assert (response.status_code, error_of(response)["code"]) == (409, "rolled_back")
    assert {key: value for key, value in response.json().items() if key != "error"} == resize


async def test_keys(backend: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "api").write_text("# team\nkey-one\n\n  key-two  \n")
    (tmp_path / "admin").write_text("boss\n")
    options = Options(api_keys=Keys.from_file(tmp_path / "api"), admin_keys=Keys.from_file(tmp_path / "admin"))
    async with connected(backend, options) as client:

        async def status(path: str, authorization: str | None) -> int:
            headers = {} if authorization is None else {"authorization": authorization}
            response = await client.get(path, headers=headers)
            if response.status_code != 200:
                error_of(response)
            return response.status_code

        for given in ("Bearer key-one", "bearer key-two"):
            assert await status("/v1/models", given) == 200
        for refused in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer key",
            "Bearer key-one x",
            "Basic key-one",
            "Bearer # team",
            "Bearer boss",
        ):
            assert await status("/v1/models", refused) == 401
        assert [await status("/admin/status", admin) for admin in ("Bearer boss", "Bearer key-one", None)] == [200, 401, 401]
        assert [await status(path, None) for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]
        unread = await client.post("/v1/completions", content=b"x" * 2_000_000)
        assert unread.status_code == 401


def test_a_keys_file_must_hold_a_key(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ValueError, match="at least one key"):
        Keys.from_file(tmp_path / "empty")
    with pytest.raises(ValueError, match="cannot read keys file"):
        Keys.from_file(tmp_path / "missing")
