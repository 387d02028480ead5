"""What a good request is answered: shapes, streams, logprobs, stop strings, several choices, metrics."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from actors.http.app import Options, create_app
from actors.http.backend import Unavailable
from actors.http.metrics import IngressMetrics, MetricsBoard
from afd_ray.text import Tokenizer
from tests.ingress_fake import MAX_CONTEXT, VOCAB_SIZE, FakeBackend, byte_ids, write_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def backend(tokenizer: Tokenizer) -> FakeBackend:
    return FakeBackend(tokenizer, byte_ids(tokenizer, "caf\u00e9 ok".encode()), end=tokenizer.encode("</s>")[0])


@pytest_asyncio.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
        yield client


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": "hi", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_completion(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    answer = await complete(client, unknown_field={"a": 1}, model="fake")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "caf\u00e9 ok", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}
    (request,) = backend.requests
    assert (request.params.max_tokens, request.params.temperature) == (16, 1.0)


async def test_chat(client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT)
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "caf\u00e9 ok", "refusal": None}
    (request,) = backend.requests
    assert request.prompt_token_ids == tuple(tokenizer.encode("u:hi|a:"))
    assert request.params.max_tokens == MAX_CONTEXT - len(request.prompt_token_ids)


async def test_chat_content_parts_and_limits(client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 7, "max_completion_tokens": 2}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert backend.requests[0].prompt_token_ids == tuple(tokenizer.encode("u:hi|a:"))
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (2, "length")


async def test_sampling_parameters_reach_the_engine(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    given = {
        "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 1,
        "frequency_penalty": -1, "seed": 5, "ignore_eos": True,
    }  # fmt: skip
    await complete(client, **given, max_tokens=3, stop="x", stop_token_ids=[9], logprobs=2)
    params = backend.requests[0].params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.max_tokens, params.stop, params.stop_token_ids, params.logprobs) == (3, ("x",), (9,), 2)


async def test_a_top_k_beyond_the_vocabulary_keeps_every_token(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await complete(client, top_k=10**30)
    assert backend.requests[0].params.top_k == VOCAB_SIZE


async def test_the_token_that_ends_a_request_is_no_text(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    (backend.end,) = byte_ids(tokenizer, b"!")
    answer = await complete(client, stop_token_ids=[backend.end], return_token_ids=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["token_ids"][-1], answer["usage"]["completion_tokens"]) == ("caf\u00e9 ok", backend.end, 9)


async def test_null_means_the_default(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    names = ("temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "logprobs", "stream_options", "ignore_eos", "model")
    await complete(client, **dict.fromkeys(names))
    await complete(client, max_tokens=None)
    defaults, rest_of_context = (request.params for request in backend.requests)
    assert (defaults.temperature, defaults.max_tokens, defaults.logprobs) == (1.0, 16, None)
    assert rest_of_context.max_tokens == MAX_CONTEXT - 2


async def test_the_default_limit_gives_way_to_the_context(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=[1] * (MAX_CONTEXT - 3))
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (3, "length")


async def test_every_request_has_a_seed_of_its_own(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await complete(client, n=2)
    await complete(client, n=2, seed=2**64 - 1)
    drawn, other, given, wrapped = (request.params.seed for request in backend.requests)
    assert None not in (drawn, other)
    assert drawn != other
    assert (given, wrapped) == (2**64 - 1, 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi", ["hi"]), (["hi", "ab"], ["hi", "ab"]), ([71, 72], [(71, 72)]), ([[71], [72, 73]], [(71,), (72, 73)])],
)
async def test_prompt_forms(
    client: httpx.AsyncClient, backend: FakeBackend, tokenizer: Tokenizer, prompt: Any, expected: list[Any]
) -> None:
    answer = await complete(client, prompt=prompt, return_token_ids=True)
    ids = [tuple(tokenizer.encode(one)) if isinstance(one, str) else one for one in expected]
    assert [request.prompt_token_ids for request in backend.requests] == ids
    assert [tuple(choice["prompt_token_ids"]) for choice in answer["choices"]] == ids
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_several_choices_of_several_prompts(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=["a", "b"], n=3)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 54, "total_tokens": 56}


async def test_completion_logprobs(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, logprobs=3))["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:3] == ["c", "a", "f"]
    assert logprobs["tokens"][-1] == "</s>"
    assert logprobs["token_logprobs"] == [-0.5] * 9
    assert logprobs["text_offset"] == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert logprobs["top_logprobs"][0] == {"c": -0.5, "d": -1.5, "e": -9999.0}
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\ufffd" in token or token == "</s>" or choice["text"][offset:].startswith(token)


async def test_zero_logprobs_are_the_chosen_token_alone(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, logprobs=0, max_tokens=1))["choices"][0]["logprobs"]
    assert logprobs == {"tokens": ["c"], "token_logprobs": [-0.5], "top_logprobs": [{"c": -0.5}], "text_offset": [0]}


async def test_chat_logprobs_carry_bytes(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2})
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == "caf\u00e9 ok"
    top = [{"token": "c", "logprob": -0.5, "bytes": [99]}, {"token": "d", "logprob": -1.5, "bytes": [100]}]
    assert content[0] == {"token": "c", "logprob": -0.5, "bytes": [99], "top_logprobs": top}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [("\u00e9 o", "caf"), (["zz", "ok"], "caf\u00e9 "), ("caf", ""), ("k!", "caf\u00e9 ok")]
)
async def test_stop_strings_across_tokens(
    client: httpx.AsyncClient, backend: FakeBackend, stop: Any, text: str, streamed: bool
) -> None:
    if streamed:
        chunks = await stream(client, "/v1/completions", {"prompt": "hi", "stop": stop})
        found = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = (await complete(client, stop=stop))["choices"][0]
        found, reason = choice["text"], choice["finish_reason"]
    assert (found, reason) == (text, "stop")
    ended_early = text != "caf\u00e9 ok"
    assert len(backend.aborted) == ended_early
    assert backend.live == set()


async def test_streamed_completion_adds_up_to_the_whole_one(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hi", "logprobs": 1, "return_token_ids": True, "stream_options": {"include_usage": True}}
    *chunks, last = await stream(client, "/v1/completions", body)
    whole = await complete(client, logprobs=1, return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert list(chain.from_iterable(choice["token_ids"] for choice in choices)) == whole["choices"][0]["token_ids"]
    for key, values in whole["choices"][0]["logprobs"].items():
        assert list(chain.from_iterable(choice["logprobs"][key] for choice in choices)) == values
    assert [choice["finish_reason"] for choice in choices] == [None] * 8 + ["stop"]
    assert ["prompt_token_ids" in choice for choice in choices] == [True] + [False] * 8
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


async def test_streamed_chat(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, "/v1/chat/completions", {**CHAT, "n": 2})
    for index in range(2):
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": "c"}
        assert "".join(delta["content"] for delta in deltas) == "caf\u00e9 ok"
        assert not any("role" in delta for delta in deltas[1:])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)


async def test_a_failing_choice_lets_the_others_finish(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.failure, backend.fail_choice, backend.fail_after = Unavailable("attention actor lost"), 1, 3
    *chunks, error = await stream(client, "/v1/completions", {"prompt": "hi", "n": 3})
    texts = ["".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index) for index in range(3)]
    assert texts == ["caf\u00e9 ok", "caf", "caf\u00e9 ok"]
    assert error["error"]["message"] == "attention actor lost"
    assert backend.live == set()


async def test_a_failing_choice_fails_the_whole_answer(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.failure, backend.fail_choice, backend.fail_after = Unavailable("attention actor lost"), 1, 3
    response = await client.post("/v1/completions", json={"prompt": "hi", "n": 3})
    assert response.status_code == 503
    assert backend.live == set()


async def test_a_failing_request_harms_no_other(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.gate = asyncio.Semaphore(0)
    running = asyncio.create_task(complete(client))
    await backend.until(lambda: len(backend.live) == 1)
    backend.failure, backend.fail_choice = Unavailable("planted"), 1
    failed = await client.post("/v1/completions", json={"prompt": "x", "n": 2})
    bad = await client.post("/v1/completions", json={"prompt": "x", "temperature": -1})
    assert (failed.status_code, bad.status_code, len(backend.live)) == (503, 400, 1)
    for _ in range(9):
        backend.gate.release()
    assert (await running)["choices"][0]["text"] == "caf\u00e9 ok"


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    one = (await client.get("/v1/models/fake")).json()
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["max_model_len"]) == ("fake", "model", MAX_CONTEXT)


async def test_admin(client: httpx.AsyncClient) -> None:
    assert (await client.get("/admin/status")).json()["state"] == "ready"
    assert (await client.post("/admin/scale", json={"ffn": 2, "timeout_s": 9})).json()["to"] == {"ffn": 2, "timeout_s": 9}
    cancelled = await client.post("/admin/scale", json={"cancel": True})
    assert (cancelled.status_code, cancelled.json()["outcome"], cancelled.json()["to"]) == (200, "rolled_back", {"cancel": True})
    assert (await client.get("/admin/decisions?after=7")).json() == {"policy": "balance", "decisions": [{"number": 8}]}
    assert (await client.post("/admin/rebalance")).json() == {"epoch": 2, "experts": [[0, 1], [1, 2]]}
    assert (await client.post("/admin/trace", json={"steps": 3})).json() == {"traceEvents": [], "steps": 3}


async def test_metrics_count_over_replicas(backend: FakeBackend) -> None:
    board, peer = MetricsBoard(), IngressMetrics()
    peer.choice_ended("stop", 5, 0.1)
    board.exchange("other", peer.snapshot(), now_s=0.0)
    metrics = IngressMetrics()

    async def peers() -> dict[str, Any]:
        return board.exchange("mine", metrics.snapshot(), now_s=1.0)

    transport = httpx.ASGITransport(create_app(backend, Options(replica="mine", peer_snapshots=peers), metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
        await complete(client)
        await client.get("/nope")
        lines = (await client.get("/metrics")).text.splitlines()
    for expected in (
        'afd_http_requests_total{replica="mine",route="/v1/completions",status="200"} 1.0',
        'afd_http_requests_total{replica="mine",route="other",status="404"} 1.0',
        'afd_generation_tokens_total{replica="mine"} 9.0',
        'afd_generation_tokens_total{replica="other"} 5.0',
        'afd_prompt_tokens_total{replica="mine"} 2.0',
        'afd_time_to_first_token_seconds_count{replica="mine"} 1.0',
        'afd_time_per_output_token_seconds_count{replica="mine"} 1.0',
        'afd_choices_finished_total{reason="stop",replica="mine"} 1.0',
        'afd_requests_running{actor="attention-0"} 0.0',
    ):
        assert expected in lines
    assert len([line for line in lines if line.startswith("# TYPE afd_generation_tokens_total")]) == 1


def test_a_replica_that_is_gone_is_forgotten() -> None:
    board = MetricsBoard(forget_after_s=60)
    board.exchange("gone", [], now_s=0.0)
    assert set(board.exchange("here", [], now_s=61.0)) == {"here"}
