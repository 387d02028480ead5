"""The two JSON shapes of an answer: completion and chat, whole and in chunks."""

from collections.abc import Sequence
from typing import Any, Protocol

from actors.http.choices import Delta, Score
from afd_ray.text import Tokenizer

LOWEST_LOGPROB = -9999.0
"""JSON has no -Infinity."""


class Shape(Protocol):
    id_prefix: str
    whole_object: str
    chunk_object: str

    def choice(self, whole: Delta, tokenizer: Tokenizer | None) -> dict[str, Any]: ...

    def chunk(self, delta: Delta, first: bool, tokenizer: Tokenizer | None) -> dict[str, Any]: ...

    def logprobs(self, scores: Sequence[Score], tokenizer: Tokenizer | None) -> dict[str, Any]: ...


class CompletionShape:
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, whole: Delta, tokenizer: Tokenizer | None) -> dict[str, Any]:
        return {"text": whole.text}

    def chunk(self, delta: Delta, first: bool, tokenizer: Tokenizer | None) -> dict[str, Any]:
        return {"text": delta.text}

    def logprobs(self, scores: Sequence[Score], tokenizer: Tokenizer | None) -> dict[str, Any]:
        return {
            "tokens": [token_text(score.token_id, tokenizer) for score in scores],
            "token_logprobs": [_clamped(score.logprob) for score in scores],
            "top_logprobs": [_alternatives(score, tokenizer) for score in scores],
            "text_offset": [score.text_offset for score in scores],
        }


class ChatShape:
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, whole: Delta, tokenizer: Tokenizer | None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": whole.text, "refusal": None}}

    def chunk(self, delta: Delta, first: bool, tokenizer: Tokenizer | None) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": delta.text} if first else {"content": delta.text}}

    def logprobs(self, scores: Sequence[Score], tokenizer: Tokenizer | None) -> dict[str, Any]:
        content = []
        for score in scores:
            top = [_chat_score(token_id, logprob, tokenizer) for token_id, logprob in score.top]
            content.append({**_chat_score(score.token_id, score.logprob, tokenizer), "top_logprobs": top})
        return {"content": content, "refusal": None}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    """As text; without a tokenizer its id. Half a character shows as the replacement character."""
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_bytes(token_id).decode(errors="replace")


def _chat_score(token_id: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    raw = None if tokenizer is None else list(tokenizer.token_bytes(token_id))
    return {"token": token_text(token_id, tokenizer), "logprob": _clamped(logprob), "bytes": raw}


def _alternatives(score: Score, tokenizer: Tokenizer | None) -> dict[str, float]:
    """By text, most likely first; the chosen token is always among them, and wins over another of the same text."""
    found: dict[str, float] = {}
    for token_id, logprob in score.top:
        found.setdefault(token_text(token_id, tokenizer), _clamped(logprob))
    return found | {token_text(score.token_id, tokenizer): _clamped(score.logprob)}


def _clamped(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if logprob == logprob else LOWEST_LOGPROB
