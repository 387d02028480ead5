"""One choice of a response: the engine's tokens read into text, log-probabilities and an ending; several choices merged into one stream."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from actors.http.backend import ModelCard, Unavailable
from afd_ray.request import FinishReason, SamplingParams, TokenOutput
from afd_ray.text import IncrementalDetokenizer


class Score(NamedTuple):
    """The log-probability of one token, and of its alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    text_offset: int
    """Characters of the choice's text before this token."""


class Delta(NamedTuple):
    """What one step, or several together, add to a choice."""

    choice: int
    """Index of the choice in the response."""
    text: str
    token_ids: tuple[int, ...]
    scores: tuple[Score, ...]
    finish_reason: FinishReason | None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class ChoiceReader:
    """Reads the engine's outputs of one choice, in order."""

    def __init__(self, choice: int, model: ModelCard, params: SamplingParams) -> None:
        self._choice = choice
        self._scored = params.logprobs is not None
        self._text = None if model.tokenizer is None else IncrementalDetokenizer(model.tokenizer, params.stop)

    def read(self, output: TokenOutput) -> Delta:
        """Raises Unavailable when the engine gave the request up."""
        if output.finish_reason in ("error", "abort"):
            raise Unavailable(output.error or "the request was aborted by the server")
        scores = self._scores(output)
        text, stopped = self._read_text(output)
        token_ids = () if output.token_id is None else (output.token_id,)
        return Delta(self._choice, text, token_ids, scores, "stop" if stopped else output.finish_reason)

    def _read_text(self, output: TokenOutput) -> tuple[str, bool]:
        """The text let out, and whether a stop string ended it."""
        if self._text is None:
            return "", False
        ends_by_token = output.finish_reason == "stop"  # the end token itself is no text
        text = "" if output.token_id is None or ends_by_token else self._text.feed(output.token_id)
        if output.finish_reason is not None:
            text += self._text.flush()
        return text, self._text.stopped is not None

    def _scores(self, output: TokenOutput) -> tuple[Score, ...]:
        if not self._scored or output.token_id is None or output.logprob is None:
            return ()
        offset = 0 if self._text is None else self._text.characters
        return (Score(output.token_id, output.logprob, output.top_logprobs, offset),)


class Gathered:
    """The whole of one choice, from its deltas."""

    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._scores: list[Score] = []
        self._finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._token_ids += delta.token_ids
        self._scores += delta.scores
        self._finish_reason = delta.finish_reason

    def whole(self) -> Delta:
        return Delta(self._choice, "".join(self._texts), tuple(self._token_ids), tuple(self._scores), self._finish_reason)


Deltas = AsyncGenerator[Delta, None]


async def gather(deltas: Deltas, count: int) -> list[Delta]:
    """The `count` choices, whole and in order."""
    choices = [Gathered(choice) for choice in range(count)]
    async with aclosing(deltas):
        async for delta in deltas:
            choices[delta.choice].add(delta)
    return [choice.whole() for choice in choices]


async def merged(choices: Sequence[Deltas]) -> Deltas:
    """The deltas of all choices as they come; closing it closes them all.

    An error before the first delta is raised at once, so that the response can still carry its status; a later one waits until the other
    choices are complete.
    """
    if len(choices) == 1:
        async with aclosing(choices[0]) as only:
            async for delta in only:
                yield delta
        return
    arrived: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(choice, arrived)) for choice in choices]
    try:
        async with aclosing(_drain(arrived, len(tasks))) as deltas:
            async for delta in deltas:
                yield delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(choice: Deltas, arrived: "asyncio.Queue[Delta | Exception | None]") -> None:
    try:
        async with aclosing(choice):
            async for delta in choice:
                arrived.put_nowait(delta)
    except Exception as error:
        arrived.put_nowait(error)
    else:
        arrived.put_nowait(None)


async def _drain(arrived: "asyncio.Queue[Delta | Exception | None]", running: int) -> Deltas:
    failure: Exception | None = None
    started = False
    while running:
        item = await arrived.get()
        if isinstance(item, Delta):
            started = True
            yield item
            continue
        running -= 1
        if isinstance(item, Exception):
            failure = failure or item
            if not started:
                break
    if failure is not None:
        raise failure
