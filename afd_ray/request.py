"""The values that travel: what a client asks for, and what the engine answers."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_STOP_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Raises ValueError, naming the parameter, its value and what is allowed, when one is out of range.
    """

    max_tokens: int | None = 16
    """New tokens at most; None: the rest of the context."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 (or -1) keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: drawn at random when the request is admitted."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report a token (0: the chosen token's logprob alone); None: no logprobs."""

    def __post_init__(self) -> None:
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _within("temperature", self.temperature, 0.0, 100.0)
        _require(_finite(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "-1 or at least 0")
        _within("min_p", self.min_p, 0.0, 1.0)
        _require(
            _finite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            "in (0, 100]",
        )
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**64, "seed", self.seed, "a 64-bit integer")
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"from 0 to {MAX_LOGPROBS}")
        _require(len(self.stop) <= MAX_STOP_SEQUENCES, "stop", len(self.stop), f"at most {MAX_STOP_SEQUENCES} strings")
        _require(all(self.stop), "stop", "''", "non-empty strings")


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue: prompt token ids (at least one) and how to sample after them."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


class KVTicket(NamedTuple):
    """Where the keys and values of a request lie that an attention actor gave back: who goes on with it may fetch them, once."""

    address: str
    """host:port of the actor that has them."""
    key: bytes
    positions: int
    """Computed tokens, from the first on; at least 1."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One new token of one request, or only the news that it ended (`token_id` None)."""

    request_id: str
    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first; empty unless asked for."""
    finish_reason: FinishReason | None = None
    """None while the request goes on."""
    error: str | None = None
    """One line, with `finish_reason` "error"."""
    epoch: int = field(default=0, compare=False)
    """In which it was computed; 0 where that is not known."""


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _within(name: str, value: float, low: float, high: float) -> None:
    _require(_finite(value) and low <= value <= high, name, value, f"from {low:g} to {high:g}")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")
