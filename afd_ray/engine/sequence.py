"""A request under way, and the work that one step does for it."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

from afd_ray.request import KVTicket, Request


class Sequence:
    """The mutable state of one request: its tokens, and where their keys and values lie."""

    __slots__ = ("aborted", "block_table", "computed", "passed_over", "prompt_count", "request", "ticket", "token_ids")

    def __init__(self, request: Request, generated: Many[int] = (), ticket: KVTicket | None = None) -> None:
        self.request = request
        self.prompt_count = len(request.prompt_token_ids)
        self.token_ids: list[int] = [*request.prompt_token_ids, *generated]
        self.computed = 0
        """Tokens whose keys and values are in the cache."""
        self.block_table: list[int] = []
        self.ticket = ticket
        """Of keys and values that are to be fetched; None: none, or they are on their way."""
        self.aborted = False
        self.passed_over = 0
        """Turns in a row at which a slot left it for another."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def output_count(self) -> int:
        return len(self.token_ids) - self.prompt_count

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_count :]

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next one can be chosen."""
        return len(self.token_ids) - self.computed

    @property
    def to_prefill(self) -> int:
        """Of `remaining`, what is not to be fetched."""
        return self.remaining - (self.ticket.positions if self.ticket else 0)

    @property
    def decodes(self) -> bool:
        """Whether its next step is one row that chooses a token."""
        return len(self.token_ids) - self.computed == 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one sequence at positions start..start+count-1."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """Whether the last row's logits choose a new token."""

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids[self.start : self.start + self.count]

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.count)

    def __str__(self) -> str:
        if self.count == 1 and self.samples:
            return f"{self.sequence.id} decode@{self.start}"
        return f"{self.sequence.id} prefill {self.start}..{self.start + self.count - 1}"


class MicroBatch(NamedTuple):
    """What one slot of the pipeline carries through all the layers: the rows of its chunks, in order."""

    slot: int
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def prompt_tokens(self) -> int:
        """Rows that are tokens of prompts."""
        prefill = [chunk for chunk in self.chunks if chunk.start < chunk.sequence.prompt_count]
        return sum(min(chunk.count, chunk.sequence.prompt_count - chunk.start) for chunk in prefill)

    def __str__(self) -> str:
        return f"slot {self.slot}: " + ", ".join(map(str, self.chunks))
