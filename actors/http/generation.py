"""/v1/completions and /v1/chat/completions: from a body to prompts, from prompts to choices, from choices to an answer."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive

from actors.http.backend import Backend, ModelCard, TimedOut, Unavailable
from actors.http.choices import ChoiceReader, Delta, Deltas, gather, merged
from actors.http.deadline import in_time
from actors.http.errors import ApiError, as_api_error, as_refusal, bad_request
from actors.http.metrics import IngressMetrics
from actors.http.protocol import MAX_CHOICES, ChatBody, CompletionBody, GenerationBody, parse_prompts
from actors.http.shapes import Shape, usage
from actors.http.wire import DONE, EventStream, event, json_response, unless_gone
from afd_ray.request import Request, SamplingParams, TokenOutput
from afd_ray.text import Tokenizer

_LONG_TEXT_CHARACTERS = 8192
"""Longer texts are encoded in a thread, so that they do not hold up the other streams."""

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, understood: a choice for each engine request."""

    id: str
    shape: Shape
    body: GenerationBody
    prompts: list[Prompt]
    requests: list[Request]
    created: int
    started_s: float


class Generation:
    """Runs jobs on a backend. `timeout_s` is for requests that give none, `clock` gives monotonic seconds, `draw_seed` a seed where none came."""

    def __init__(
        self,
        backend: Backend,
        metrics: IngressMetrics,
        *,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        draw_seed: Callable[[], int] = lambda: random.getrandbits(63),
    ) -> None:
        self._backend = backend
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._draw_seed = draw_seed

    async def prepare(self, body: GenerationBody, shape: Shape, request_id: str) -> Job:
        """`request_id` is what its client calls it, and need not be unique. Raises ApiError 400 or 404 for a body that cannot be served."""
        started_s = self._clock()
        model = self._backend.model
        if body.model is not None and body.model != model.name:
            raise ApiError(
                404, f"model '{body.model}' does not exist; this server has '{model.name}'", param="model", code="model_not_found"
            )
        prompts = await read_prompts(body, model)
        try:
            params = body.sampling()
        except ValueError as error:
            raise as_refusal(error) from None
        _known_ids(params.stop_token_ids, model.vocab_size, "stop_token_ids")
        job_id = f"{shape.id_prefix}{request_id}-{uuid.uuid4().hex[:16]}"
        requests = self._requests(job_id, body, prompts, params, model)
        return Job(job_id, shape, body, prompts, requests, int(self._wall_clock()), started_s)

    async def answer(self, job: Job, receive: Receive) -> Response:
        """Raises ClientGone when the client leaves before the answer begins."""
        deltas = merged([self._choice(index, request, job) for index, request in enumerate(job.requests)])
        if not job.body.stream:
            choices = await unless_gone(receive, gather(deltas, len(job.requests)))
            return json_response(whole_answer(job, choices, self._backend.model))
        # The status is known once the first token is: a full queue must still be able to answer 429.
        first = await unless_gone(receive, anext(deltas))
        return EventStream(self._events(job, first, deltas))

    def _requests(
        self, job_id: str, body: GenerationBody, prompts: list[Prompt], params: SamplingParams, model: ModelCard
    ) -> list[Request]:
        copies = body.choices
        if len(prompts) * copies > MAX_CHOICES:
            raise bad_request(
                f"prompt must ask for at most {MAX_CHOICES} choices in all, got {len(prompts) * copies}", param="prompt"
            )
        requests: list[Request] = []
        for prompt in prompts:
            limit = fit_context(len(prompt), params.max_tokens, model.max_context, by_default=not body.limits_tokens)
            for copy in range(copies):
                seed = self._draw_seed() if params.seed is None else _nth_seed(params.seed, copy)
                request_id = f"{job_id}-{len(requests)}"
                fitted = replace(params, seed=seed, max_tokens=limit, top_k=min(params.top_k, model.vocab_size))
                requests.append(Request(request_id, prompt, fitted))
        return requests

    async def _choice(self, index: int, request: Request, job: Job) -> Deltas:
        reader = ChoiceReader(index, self._backend.model, request.params)
        first_s, tokens, reason = None, 0, "abort"
        try:
            async with aclosing(self._outputs(request, job)) as outputs:
                async for output in outputs:
                    delta = reader.read(output)
                    tokens += len(delta.token_ids)
                    if first_s is None:
                        first_s = self._clock()
                        self._metrics.first_token(first_s - job.started_s, len(request.prompt_token_ids))
                    reason = delta.finish_reason or reason
                    yield delta
                    if delta.finished:
                        return
            raise Unavailable("the engine ended the request too early")
        except Exception as error:
            reason = "timeout" if isinstance(error, TimedOut) else "error"
            raise
        finally:
            now_s = self._clock()
            self._metrics.choice_ended(reason, tokens, now_s - (first_s or now_s))

    def _outputs(self, request: Request, job: Job) -> AsyncGenerator[TokenOutput, None]:
        outputs = refusable(self._backend.generate(request))
        limit_s = self._timeout_s if job.body.timeout_s is None else job.body.timeout_s
        return outputs if limit_s is None else in_time(outputs, limit_s, job.started_s, self._clock)

    async def _events(self, job: Job, first: Delta, rest: Deltas) -> AsyncIterator[bytes]:
        tokens = len(first.token_ids)
        begun = {first.choice}
        async with aclosing(rest):
            yield event(chunk(job, first, True, self._backend.model))
            try:
                async for delta in rest:
                    tokens += len(delta.token_ids)
                    yield event(chunk(job, delta, delta.choice not in begun, self._backend.model))
                    begun.add(delta.choice)
                if job.body.include_usage:
                    yield event(
                        {**_head(job, job.shape.chunk_object, self._backend.model), "choices": [], "usage": _usage(job, tokens)}
                    )
            except Exception as error:
                yield event(as_api_error(error).body())
            yield DONE


async def refusable(outputs: AsyncIterator[TokenOutput]) -> AsyncGenerator[TokenOutput, None]:
    """The engine's ValueError is the client's mistake; closing this closes `outputs`."""
    try:
        async for output in outputs:
            yield output
    except ValueError as error:
        raise as_refusal(error) from None
    finally:
        close = getattr(outputs, "aclose", None)
        if close is not None:
            await close()


async def read_prompts(body: GenerationBody, model: ModelCard) -> list[Prompt]:
    """Token ids of each prompt; raises ApiError 400."""
    if isinstance(body, ChatBody):
        return [await _chat_prompt(body, _needs_tokenizer(model, "messages"))]
    assert isinstance(body, CompletionBody)
    if body.echo:
        raise bad_request("echo must be false: the prompt cannot be returned with the completion", param="echo")
    prompts = []
    for prompt in parse_prompts(body.prompt):
        if isinstance(prompt, str):
            prompts.append(await _encode(_needs_tokenizer(model, "prompt"), prompt, "prompt"))
        else:
            prompts.append(_known_ids(prompt, model.vocab_size, "prompt"))
    return prompts


def fit_context(prompt_tokens: int, max_tokens: int | None, max_context: int, *, by_default: bool = False) -> int:
    """New tokens at most; a limit that the client did not ask for (`by_default`) gives way to the context.

    Raises ApiError when the context is too short for the request.
    """
    room = max_context - prompt_tokens
    wanted = 1 if max_tokens is None or by_default else max_tokens
    if wanted <= room:
        return room if max_tokens is None else min(max_tokens, room)
    asked = f"{prompt_tokens} in the prompt" + (f" and max_tokens {max_tokens}" if not by_default and max_tokens else "")
    message = f"prompt and output must fit the model's context of {max_context} tokens, got {asked}"
    raise bad_request(message, param="prompt" if room < 1 else "max_tokens", code="context_length_exceeded")


async def _chat_prompt(body: ChatBody, tokenizer: Tokenizer) -> Prompt:
    if not body.messages:
        raise bad_request("messages must not be empty", param="messages")
    messages = [message.for_template(index) for index, message in enumerate(body.messages)]
    variables = body.template_variables()
    try:
        text = tokenizer.render_chat(messages, **variables)
    except (ValueError, TypeError) as error:
        raise bad_request(str(error), param="messages") from None
    return await _encode(tokenizer, text, "messages", add_special_tokens=False)


async def _encode(tokenizer: Tokenizer, text: str, param: str, *, add_special_tokens: bool = True) -> Prompt:
    try:
        if len(text) > _LONG_TEXT_CHARACTERS:
            ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        else:
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise bad_request(str(error), param=param) from None
    if not ids:
        raise bad_request(f"{param} must not be empty", param=param)
    return tuple(ids)


def _needs_tokenizer(model: ModelCard, param: str) -> Tokenizer:
    if model.tokenizer is None:
        raise bad_request(f"{param} must be token ids for /v1/completions: model '{model.name}' has no tokenizer", param=param)
    return model.tokenizer


def _known_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> Prompt:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise bad_request(f"{param} must hold token ids from 0 to {vocab_size - 1}, got {str(token_id)[:30]}", param=param)
    return tuple(token_ids)


def _nth_seed(seed: int, copy: int) -> int:
    """Each choice of one prompt has a seed of its own; the first has the one given."""
    return seed + copy if seed + copy < 2**64 else seed + copy - 2**64


def whole_answer(job: Job, choices: list[Delta], model: ModelCard) -> dict[str, Any]:
    answered = [_whole_choice(job, choice, model) for choice in choices]
    tokens = sum(len(choice.token_ids) for choice in choices)
    answer = {**_head(job, job.shape.whole_object, model), "choices": answered, "usage": _usage(job, tokens)}
    if job.body.return_token_ids and isinstance(job.body, ChatBody):
        answer["prompt_token_ids"] = list(job.prompts[0])
    return answer


def chunk(job: Job, delta: Delta, first: bool, model: ModelCard) -> dict[str, Any]:
    """`first`: of its choice."""
    choice = {"index": delta.choice, **job.shape.chunk(delta, first, model.tokenizer), **_ending(job, delta, model)}
    if job.body.return_token_ids:
        choice |= {"token_ids": list(delta.token_ids)}
        if first:
            choice |= {"prompt_token_ids": list(job.requests[delta.choice].prompt_token_ids)}
    usage_field = {"usage": None} if job.body.include_usage else {}
    return {**_head(job, job.shape.chunk_object, model), "choices": [choice], **usage_field}


def _whole_choice(job: Job, whole: Delta, model: ModelCard) -> dict[str, Any]:
    choice = {"index": whole.choice, **job.shape.choice(whole, model.tokenizer), **_ending(job, whole, model)}
    if job.body.return_token_ids:
        prompt = job.requests[whole.choice].prompt_token_ids
        choice |= {"token_ids": list(whole.token_ids), "prompt_token_ids": list(prompt)}
    return choice


def _ending(job: Job, delta: Delta, model: ModelCard) -> dict[str, Any]:
    scored = job.requests[delta.choice].params.logprobs is not None
    logprobs = job.shape.logprobs(delta.scores, model.tokenizer) if scored else None
    return {"logprobs": logprobs, "finish_reason": delta.finish_reason}


def _head(job: Job, kind: str, model: ModelCard) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": model.name}


def _usage(job: Job, completion_tokens: int) -> dict[str, int]:
    return usage(sum(map(len, job.prompts)), completion_tokens)
