"""Choosing the next token from logits."""

from typing import NamedTuple


class Sampled(NamedTuple):
    """The token chosen for one row, or the reason why none could be."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None
