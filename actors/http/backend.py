"""What the HTTP interface needs of the cluster behind it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from afd_ray.metrics import Sample
from afd_ray.request import Request, TokenOutput
from afd_ray.text import Tokenizer

STOPPING = "the server is stopping"
"""What everybody is told from then on."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    max_context: int
    """Tokens at most, prompt and output together."""
    vocab_size: int
    tokenizer: Tokenizer | None
    """None: the model serves token ids only."""
    created: int
    """Seconds since 1970."""


class Overloaded(RuntimeError):
    """The queue is full; the client should come back after `retry_after_s`."""

    def __init__(self, reason: str, retry_after_s: int = 1) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Unavailable(RuntimeError):
    """No capacity to serve the request at all, for now."""


class TimedOut(RuntimeError):
    """The request was not over in the time it was given."""


class Rejected(RuntimeError):
    """The cluster turned an administrative request down; the message is one line."""


class Backend(Protocol):
    @property
    def model(self) -> ModelCard: ...

    def ready(self) -> bool: ...

    @property
    def stopping(self) -> bool:
        """For good: it will not be ready again."""
        ...

    def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Closing the iterator early aborts the request. ValueError for one that can never run, Overloaded, Unavailable."""
        ...

    async def status(self) -> dict[str, Any]: ...

    async def scale(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """`wanted`: what of attention, ffn, ffn_tensor_parallel and timeout_s is given, or `cancel` for the resize in progress.

        Rejected when a resize is in progress; for `cancel`, when there is none, or it has committed.
        """
        ...

    async def decisions(self, after: int) -> dict[str, Any]:
        """Of the autoscaler, those numbered above `after`."""
        ...

    async def measured(self) -> dict[str, Any]: ...

    async def rebalance(self) -> dict[str, Any]: ...

    async def trace(self, steps: int) -> dict[str, Any]: ...

    async def metrics(self) -> list[Sample]:
        """Of the cluster; at least what this side knows of it."""
        ...
