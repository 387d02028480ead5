"""A simulated request, and what is computed for an attention rank's requests."""

from typing import NamedTuple, Protocol

from afd_ray.engine.stage_costs import CostLine


class Job:
    """A request with the tokens that it has so far; times are picoseconds, `None` until then."""

    __slots__ = ("arrived_ps", "first_ps", "last_ps", "number", "output", "produced", "prompt", "stay")

    def __init__(self, number: int, arrived_ps: int, prompt: int, output: int) -> None:
        self.number, self.arrived_ps, self.prompt, self.output = number, arrived_ps, prompt, output
        self.produced = 0
        """Tokens that its client has; up to date whenever it is not decoding."""
        self.first_ps: int | None = None
        self.last_ps = 0
        """Of the newest token, where tokens come one by one."""
        self.stay = 0
        """Counts its decoding phases: what was foretold of an earlier one holds no longer."""


class Work(NamedTuple):
    """What an attention rank computes at a time, in all its micro-batches together."""

    decoding: int
    """Rows that each choose a token."""
    prompt_rows: int
    context_tokens: int
    """Cached tokens of all rows' sequences, the rows' own included."""

    @property
    def rows(self) -> int:
        return self.decoding + self.prompt_rows


class Rank(Protocol):
    """One attention rank's requests."""

    outstanding: int
    """Requests that it has, admitted or not."""
    outstanding_tokens: int

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def preemptions(self) -> int: ...

    @property
    def kv_used(self) -> float:
        """Share of its KV blocks that is taken, where rounds are counted at the last one that it began."""
        ...

    @property
    def oldest_waiting_ps(self) -> int | None:
        """When the request that has waited longest came."""
        ...

    def add(self, job: Job) -> None:
        """Queue a request; one that has tokens already goes ahead of those that have none."""
        ...


class RoundRank(Rank, Protocol):
    """The same, round by round."""

    costs: CostLine | None
    """What a row takes on its way through a layer: bounds the prompt rows that join decoding ones; None: unknown."""

    def begin(self, number: int, micro_batches: int) -> Work:
        """What round `number` computes."""
        ...

    def steady_from(self, number: int) -> int:
        """The first round after `number` that may not be like it but for each sequence's next token."""
        ...

    def end(self, number: int) -> tuple[list[Job], list[Job]]:
        """Round `number` is over: who had the first token in it, and who had the last."""
        ...

    def evict(self, number: int) -> list[Job]:
        """Every request with the tokens that it has before round `number`, and none of them here any more."""
        ...
