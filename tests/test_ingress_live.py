"""The HTTP interface behind a real server: the official client, the first token at once, and clients that go away."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from actors.http.app import create_app
from afd_ray.text import Tokenizer
from tests.ingress_fake import FakeBackend, byte_ids, write_tokenizer

TIMEOUT_S = 20


class Server:
    """uvicorn in a thread of its own, on a free port."""

    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend
        config = uvicorn.Config(create_app(backend), port=0, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0)
        self._started.set()
        await serving

    def on_loop(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(work(), TIMEOUT_S)

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    def until(self, condition: Callable[[FakeBackend], bool]) -> None:
        self.on_loop(lambda: self.backend.until(lambda: condition(self.backend)))

    def gate(self, tokens: int) -> None:
        """Lets this many tokens pass."""

        async def release() -> None:
            self.backend.gate = self.backend.gate or asyncio.Semaphore(0)
            for _ in range(tokens):
                self.backend.gate.release()

        self.on_loop(release)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path))
    assert tokenizer is not None
    server = Server(FakeBackend(tokenizer, byte_ids(tokenizer, b"hello world"), end=tokenizer.encode("</s>")[0]))
    yield server
    server.close()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


def test_openai_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    completion = client.completions.create(model="fake", prompt="hi", logprobs=2, seed=1, stop=["wor"])
    assert completion.choices[0].text == "hello "
    assert completion.choices[0].logprobs is not None
    chat = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.message.content for choice in chat.choices] == ["hello world"] * 2
    assert chat.usage is not None
    assert chat.usage.completion_tokens == 24


def test_openai_client_streams(client: openai.OpenAI) -> None:
    texts = client.completions.create(model="fake", prompt="hi", stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts) == "hello world"
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 12


def test_openai_client_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fake", prompt="")
    assert bad.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_an_error_in_a_stream_reaches_the_client(server: Server, client: openai.OpenAI) -> None:
    server.backend.failure, server.backend.fail_after = RuntimeError("planted"), 3
    with pytest.raises(openai.APIError, match="internal error"):
        list(client.completions.create(model="fake", prompt="hi", stream=True))


def test_the_first_token_is_flushed_at_once(server: Server) -> None:
    """The engine gives one token and then nothing: the client must have it all the same."""
    server.gate(1)
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={"prompt": "hi", "stream": True}, timeout=TIMEOUT_S
    ) as response:
        events = response.iter_lines()
        assert '"text":"h"' in next(events)
        server.gate(20)
        assert [line for line in events if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_client_that_goes_away_ends_its_request(server: Server, streamed: bool, tokens: int) -> None:
    server.gate(2 * tokens)
    body = {"prompt": "hi", "stream": streamed, "n": 2}

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            asking = asyncio.create_task(client.post(f"{server.url}/v1/completions", json=body))
            await asyncio.to_thread(server.until, lambda backend: len(backend.live) == 2)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    server.until(lambda backend: len(backend.aborted) == 2)
    assert server.backend.live == set()
    server.gate(100)
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "hi"}, timeout=TIMEOUT_S).status_code == 200
