"""The official `openai` client against the live server."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.live_server import DEADLINE_S, LiveServer

pytestmark = pytest.mark.ray

MODEL = "demo"
QUESTION: Any = [{"role": "user", "content": "Sort these words: pear fig plum"}]
PROMPT = "Ben has 7 hats."
ON: Any = {"ignore_eos": True}
"""However soon the model would end."""


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "afd-ray"


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=ON)
    (choice,) = answer.choices
    assert choice.text
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.usage.completion_tokens, choice.finish_reason) == (12, "length")


def test_completion_streamed_says_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "extra_body": ON}
    whole = client.completions.create(**asked)
    *chunks, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert len(chunks) > 5
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_chat_streamed_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "stop"
    *chunks, last = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]
    assert (last.choices, last.usage) == ([], whole.usage)


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3, extra_body=ON)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    assert scores.text_offset is not None
    assert answer.usage is not None
    assert len(scores.tokens) == answer.usage.completion_tokens == len(scores.text_offset)
    for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert top is not None
        assert logprob is not None
        assert logprob == max(top.values()) == top[token]
        assert sum(map(math.exp, top.values())) <= 1.001


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert all(score.top_logprobs[0].token == score.token for score in choice.logprobs.content)
    assert all(len(score.top_logprobs) == 2 for score in choice.logprobs.content)
    said = b"".join(bytes(score.bytes or ()) for score in choice.logprobs.content)
    assert said.startswith((choice.message.content or "").encode())


def test_stop_string(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "extra_body": ON}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[4:6]
    before = whole[: whole.index(stop)]
    stopped = client.completions.create(**asked, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (before, "stop")
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == before


def test_seed(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=30, temperature=1.5, seed=seed, extra_body=ON)
        return answer.choices[0].text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_several_choices_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Ben has"]
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 10, "temperature": 1.2, "seed": 3, "extra_body": ON}
    together = client.completions.create(**asked, prompt=prompts, n=2)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        alone = client.completions.create(**asked, prompt=prompt, n=2)
        assert [choice.text for choice in alone.choices] == [choice.text for choice in together.choices[2 * i : 2 * i + 2]]
    streamed = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**asked, prompt=prompts, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {choice.index: choice.text for choice in together.choices}


def test_token_ids_in_and_out(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0, "extra_body": ON | {"return_token_ids": True}}
    text = client.completions.create(**asked, prompt=PROMPT).choices[0].model_dump()
    ids = client.completions.create(**asked, prompt=text["prompt_token_ids"]).choices[0].model_dump()
    assert (ids["text"], ids["token_ids"]) == (text["text"], text["token_ids"])
    both = client.completions.create(**asked, prompt=[text["prompt_token_ids"]] * 2)
    assert [choice.text for choice in both.choices] == [text["text"]] * 2
    chunks = [chunk.choices[0].model_dump() for chunk in client.completions.create(**asked, prompt=PROMPT, stream=True)]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == text["token_ids"]


def test_max_tokens_and_ignore_eos(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=50, extra_body=ON
    )
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (50, "length")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'demo'") as unknown:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature must be from 0 to 100") as wrong:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="messages must not be empty"):
        client.chat.completions.create(model=MODEL, messages=[], stream=True)
