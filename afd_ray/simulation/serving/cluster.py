"""A simulated cluster: an epoch's ranks and the requests on them, on a virtual clock. `in_rounds` and `in_layers` say how time passes in it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving.jobs import Job, Rank, Work
from afd_ray.simulation.serving.rounds import PS_PER_US
from afd_ray.simulation.serving.stages import Shape, StageModel

R = TypeVar("R", bound=Rank)


class Member(NamedTuple):
    """An actor: its name, and how many times as long its stages last as the model says."""

    name: str
    slowness: float = 1.0


class Samples(NamedTuple):
    """What stages of one layer take at the moment, in microseconds, as a live cluster would measure them."""

    attention: Sequence[tuple[float, float, float]]
    """(rows, context tokens, us) of a micro-batch of an attention rank."""
    transfer: Sequence[tuple[float, float]]
    """(rows, us), both ways."""
    ffn: tuple[float, float]
    """(rows, us) of all attention ranks together."""


class Log(Protocol):
    """Who is told what happens, times in picoseconds."""

    def passed(self, rounds: int, duration_ps: int, attention_ps: int, ffn_ps: int) -> None:
        """Rounds went by, in each of them the slowest rank's time in a slot and the FFN's."""
        ...

    def decoded(self, tokens: int, gap_ps: float) -> None:
        """So many tokens came, each that long after its sequence's last one."""
        ...

    def first_token(self, job: Job, at_ps: int) -> None: ...

    def finished(self, job: Job, at_ps: int) -> None: ...


class Cluster(ABC):
    """Requests go to the attention rank with the least outstanding work, as at the ingress."""

    plans_itself: bool
    """Whether its ranks choose the number of micro-batches, or `use` says it."""

    def __init__(self, stages: StageModel, layers: int, log: Log, token_budget: int) -> None:
        self.now_ps = 0
        self.attention: tuple[Member, ...] = ()
        self.ffn: tuple[Member, ...] = ()
        self.shape = Shape(0)
        self.micro_batches = 1
        self.homeless: list[Job] = []
        """Requests that wait for an attention rank."""
        self._stages, self._layers, self._log, self._budget = stages, layers, log, token_budget
        self._slowest_ffn = 1.0

    @property
    @abstractmethod
    def ranks(self) -> Sequence[Rank]: ...

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether there is something to compute, and somebody to do it."""

    @property
    @abstractmethod
    def work(self) -> list[Work]:
        """What each attention rank computes at the moment."""

    @abstractmethod
    def samples(self) -> Samples | None:
        """None: nothing is computed."""

    @abstractmethod
    def advance(self, until_ps: int) -> None:
        """Lets time pass, to `until_ps` or to where somebody should look again."""

    @abstractmethod
    def take_back(self) -> None:
        """Somebody is lost: what is in flight is computed again."""

    @abstractmethod
    def form(self, attention: Sequence[Member], ffn: Sequence[Member], shape: Shape) -> None:
        """A new epoch at a step boundary: ranks of members that stay keep their requests, those of others move."""

    @abstractmethod
    def submit(self, job: Job) -> None: ...

    @abstractmethod
    def use(self, micro_batches: int) -> None:
        """So many in flight from now on."""

    @property
    def outstanding(self) -> int:
        """Requests that are not over."""
        return len(self.homeless) + sum(rank.outstanding for rank in self.ranks)

    def pause(self, duration_ps: int) -> None:
        """Nobody computes."""
        self.now_ps += duration_ps

    def row_costs(self) -> CostLine | None:
        """What a row costs on its way through a layer, as an attention rank would have learned it."""
        if not self.ffn:
            return None
        fixed, per_token = self._stages.attention_us(1)
        most, _ = self._stages.attention_us(self._budget)
        ffn, most_ffn = (self._stages.ffn_us(rows, self.shape) for rows in (1, self._budget))
        per_row = (most + most_ffn - fixed - ffn) / max(1, self._budget - 1)
        return CostLine(max(0.0, fixed + ffn - per_row), per_row, per_token)

    def _replace_members(
        self, attention: Sequence[Member], ffn: Sequence[Member], shape: Shape, evict: Callable[[int], list[Job]]
    ) -> list[int | None]:
        """For each attention rank of the new epoch which one it was before (None: it is new); requests of the others, as `evict` gives them up, are homeless."""
        before = {member: rank for rank, member in enumerate(self.attention)}
        moved = [job for member, rank in before.items() if member not in attention for job in evict(rank)]
        self.homeless = [*moved, *self.homeless]
        self.attention, self.ffn, self.shape = tuple(attention), tuple(ffn), shape
        self._slowest_ffn = max((member.slowness for member in self.ffn), default=1.0)
        return [before.get(member) for member in self.attention]

    def _house(self) -> None:
        """The homeless are asked for again."""
        waiting, self.homeless = self.homeless, []
        for job in waiting:
            self.submit(job)


def stage_us(duration_ps: float, layers: int) -> float:
    """Of one layer."""
    return duration_ps / PS_PER_US / layers
