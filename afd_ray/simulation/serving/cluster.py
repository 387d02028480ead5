"""Attention and FFN ranks on a virtual clock: rounds, one after the other, each as long as the pipeline's arithmetic says."""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving.jobs import Job, Rank, Work
from afd_ray.simulation.serving.rounds import PS_PER_US, PassTimes, picoseconds
from afd_ray.simulation.serving.stages import Shape, StageModel

MakeRank = Callable[[CostLine | None], Rank]


class Member(NamedTuple):
    """An actor: its name, and how many times as long its stages last as the model says."""

    name: str
    slowness: float = 1.0


class Log(Protocol):
    """Who is told what happens, times in picoseconds."""

    def passed(self, rounds: int, duration_ps: int, tokens: int, attention_ps: int, ffn_ps: int) -> None:
        """Rounds went by, with so many tokens of sequences that decode, the slowest rank's time in a slot and the FFN's."""
        ...

    def first_token(self, job: Job, at_ps: int) -> None: ...

    def finished(self, job: Job, at_ps: int) -> None: ...


class Cluster:
    """An epoch's ranks and the requests on them. Requests go to the attention rank with the least outstanding work, as at the ingress."""

    def __init__(self, stages: StageModel, layers: int, make_rank: MakeRank, log: Log, token_budget: int) -> None:
        self.now_ps = 0
        self.number = 0
        """Of the next round."""
        self.attention: tuple[Member, ...] = ()
        self.ffn: tuple[Member, ...] = ()
        self.shape = Shape(0)
        self.micro_batches = 1
        self.homeless: list[Job] = []
        """Requests that wait for an attention rank."""
        self.ranks: list[Rank] = []
        self._stages, self._layers, self._make_rank, self._log, self._budget = stages, layers, make_rank, log, token_budget
        self._times = PassTimes(0)
        self._work: list[Work] = []
        self._unsteady: set[int] = set()
        self._steady: list[tuple[int, int]] = []  # (round, rank): when to look at it again; the last entry of a rank counts
        self._look: list[int] = []
        self._begun: list[int] = []  # the round that a rank's work was told for
        self._decoding = self._rows = 0
        self._loads: list[tuple[int, int]] = []
        self._slowest_ffn = 1.0
        self._ffn_times: dict[tuple[int, int], int] = {}  # by rows and micro-batches

    @property
    def busy(self) -> bool:
        """Whether there is something to compute, and somebody to do it."""
        return bool(self.ffn and (self._rows or self._unsteady))

    @property
    def outstanding(self) -> int:
        """Requests that are not over."""
        return len(self.homeless) + sum(rank.outstanding for rank in self.ranks)

    @property
    def work(self) -> list[Work]:
        """What each attention rank computes in the present round."""
        passed = [self.number - begun for begun in self._begun]
        return [w._replace(context_tokens=w.context_tokens + w.decoding * p) for w, p in zip(self._work, passed, strict=True)]

    def form(self, attention: Sequence[Member], ffn: Sequence[Member], shape: Shape) -> None:
        """A new epoch at a step boundary: ranks of members that stay keep their requests, those of others move."""
        kept = dict(zip(self.attention, self.ranks, strict=True))
        moved = [job for member, rank in kept.items() if member not in attention for job in rank.evict(self.number)]
        self.attention, self.ffn, self.shape = tuple(attention), tuple(ffn), shape
        self._slowest_ffn = max((member.slowness for member in self.ffn), default=1.0)
        self._ffn_times = {}
        costs = self.row_costs()
        self.ranks = [kept.get(member) or self._make_rank(costs) for member in self.attention]
        for rank in self.ranks:
            rank.costs = costs
        self._times = PassTimes(max(1, len(self.ranks)))
        self._work = [Work(0, 0, 0)] * len(self.ranks)
        self._look = [0] * len(self.ranks)
        self._begun = [0] * len(self.ranks)
        self._steady = []
        self._decoding = self._rows = 0
        self._unsteady = {index for index, rank in enumerate(self.ranks) if rank.outstanding}
        self._loads = [_load(rank) for rank in self.ranks]
        waiting, self.homeless = [*moved, *self.homeless], []
        for job in waiting:
            self.submit(job)

    def use(self, micro_batches: int) -> None:
        """So many in flight from the next round on."""
        if micro_batches != self.micro_batches:
            self.micro_batches = micro_batches
            self._unsteady.update(index for index, work in enumerate(self._work) if work.rows)

    def submit(self, job: Job) -> None:
        if not self.ranks or not self.ffn:
            self.homeless.append(job)
            return
        index = self._loads.index(min(self._loads))
        rank = self.ranks[index]
        rank.add(job)
        self._loads[index] = _load(rank)
        self._unsteady.add(index)

    def pause(self, duration_ps: int) -> None:
        """Nobody computes."""
        self.now_ps += duration_ps

    def advance(self, until_ps: int) -> None:
        """One run of rounds: those that begin before `until_ps` and are alike, at least one."""
        for index in sorted(self._unsteady):
            self._begin(index)
        changed, self._unsteady = sorted(self._unsteady), set()
        if not self._rows:
            return
        self._times.ffn_ps = self.ffn_ps(self._rows)
        while self._steady[0][0] != self._look[self._steady[0][1]]:
            heapq.heappop(self._steady)
        run = self._times.run_until(self.number, self._steady[0][0] - self.number, until_ps - self.now_ps)
        self._log.passed(run.rounds, run.duration_ps, self._decoding * run.rounds, run.attention_ps, self._times.ffn_ps)
        self.number += run.rounds
        self.now_ps += run.duration_ps
        self._end(changed)

    def row_costs(self) -> CostLine | None:
        """What a row costs on its way through a layer, as an attention rank would have learned it."""
        if not self.ffn:
            return None
        fixed, per_token = self._stages.attention_us(1)
        most, _ = self._stages.attention_us(self._budget)
        ffn, most_ffn = (self._stages.ffn_us(rows, self.shape) for rows in (1, self._budget))
        per_row = (most + most_ffn - fixed - ffn) / max(1, self._budget - 1)
        return CostLine(max(0.0, fixed + ffn - per_row), per_row, per_token)

    def _begin(self, index: int) -> None:
        rank, before = self.ranks[index], self._work[index]
        work = self._work[index] = rank.begin(self.number, self.micro_batches)
        self._begun[index] = self.number
        self._decoding += work.decoding - before.decoding
        self._rows += work.rows - before.rows
        look = self._look[index] = rank.steady_from(self.number)
        if work.rows:
            heapq.heappush(self._steady, (look, index))
        else:
            self._look[index] = -1
        self._set_times(index, work)

    def _set_times(self, index: int, work: Work) -> None:
        if not work.rows:
            self._times.set_rank(index, self.number, 0, 0, 0)
            return
        rows, passes = work.rows / self.micro_batches, self._layers * self.attention[index].slowness
        fixed_us, per_token_us = self._stages.attention_us(rows)
        per_token_ps = picoseconds(passes * per_token_us / self.micro_batches)
        attention_ps = picoseconds(passes * fixed_us) + per_token_ps * work.context_tokens
        transfer_ps = picoseconds(self._layers * self._stages.transfer_us(rows))
        self._times.micro_batches = self.micro_batches
        self._times.set_rank(index, self.number, attention_ps, per_token_ps * work.decoding, transfer_ps)

    def ffn_ps(self, rows: int) -> int:
        """A micro-batch's time in the FFN through all layers, with so many rows of all attention ranks in a round."""
        times = self._ffn_times
        if (rows, self.micro_batches) not in times:
            us = self._layers * self._slowest_ffn * self._stages.ffn_us(rows / self.micro_batches, self.shape)
            times[rows, self.micro_batches] = picoseconds(us)
        return times[rows, self.micro_batches]

    def _end(self, changed: Sequence[int]) -> None:
        """Of the rounds that just went by: ranks whose last round was like no other, and those that end a sequence in it."""
        last = self.number - 1
        due = set()
        while self._steady and self._steady[0][0] <= self.number:
            look, index = heapq.heappop(self._steady)
            if look == self._look[index]:
                due.add(index)
        for index in sorted(due):
            rank = self.ranks[index]
            first, finished = rank.end(last)
            for job in first:
                job.first_ps = self.now_ps
                self._log.first_token(job, self.now_ps)
            for job in finished:
                self._log.finished(job, self.now_ps)
            self._loads[index] = _load(rank)
        self._unsteady |= due


def _load(rank: Rank) -> tuple[int, int]:
    return rank.outstanding, rank.outstanding_tokens


def stage_us(duration_ps: float, layers: int) -> float:
    """Of one layer."""
    return duration_ps / PS_PER_US / layers
