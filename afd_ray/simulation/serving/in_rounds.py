"""Rounds, one after the other, each as long as the pipeline's arithmetic says: fast, for days and for hundreds of actors.

In a round every running sequence gets a token. All attention ranks begin and end it together, and a micro-batch has an even share of a rank's rows.
"""

import heapq
from collections.abc import Callable, Sequence

from afd_ray.engine.stage_costs import CostLine
from afd_ray.simulation.serving.cluster import Cluster, Log, Member, Samples, stage_us
from afd_ray.simulation.serving.jobs import Job, RoundRank, Work
from afd_ray.simulation.serving.rounds import PassTimes, picoseconds
from afd_ray.simulation.serving.stages import Shape, StageModel

MakeRank = Callable[[CostLine | None], RoundRank]
MOST_SAMPLED = 8
"""Attention ranks whose stages are looked at each time."""


class RoundCluster(Cluster):
    """A run of rounds that are alike is one step."""

    plans_itself = False

    def __init__(self, stages: StageModel, layers: int, make_rank: MakeRank, log: Log, token_budget: int) -> None:
        super().__init__(stages, layers, log, token_budget)
        self.number = 0
        """Of the next round."""
        self._ranks: list[RoundRank] = []
        self._make_rank = make_rank
        self._times = PassTimes(0)
        self._work: list[Work] = []
        self._unsteady: set[int] = set()
        self._steady: list[tuple[int, int]] = []  # (round, rank): when to look at it again; the last entry of a rank counts
        self._look: list[int] = []
        self._begun: list[int] = []  # the round that a rank's work was told for
        self._decoding = self._rows = 0
        self._loads: list[tuple[int, int]] = []
        self._ffn_times: dict[tuple[int, int], int] = {}  # by rows and micro-batches

    @property
    def ranks(self) -> Sequence[RoundRank]:
        return self._ranks

    @property
    def busy(self) -> bool:
        return bool(self.ffn and (self._rows or self._unsteady))

    @property
    def work(self) -> list[Work]:
        passed = [self.number - begun for begun in self._begun]
        return [w._replace(context_tokens=w.context_tokens + w.decoding * p) for w, p in zip(self._work, passed, strict=True)]

    def samples(self) -> Samples | None:
        work, slots, stages = self.work, self.micro_batches, self._stages
        rows = sum(one.rows for one in work)
        if not rows or not self.ffn:
            return None
        attention, transfer = [], []
        for member, own in [pair for pair in zip(self.attention, work, strict=True) if pair[1].rows][:MOST_SAMPLED]:
            mine, context = own.rows / slots, own.context_tokens / slots
            fixed_us, per_token_us = stages.attention_us(mine)
            attention.append((mine, context, member.slowness * (fixed_us + per_token_us * context)))
            transfer.append((mine, stages.transfer_us(mine)))
        return Samples(attention, transfer, (rows / slots, stage_us(self.ffn_ps(rows), self._layers)))

    def take_back(self) -> None:
        """The round that would have ended is begun again."""

    def form(self, attention: Sequence[Member], ffn: Sequence[Member], shape: Shape) -> None:
        ranks = self._ranks
        kept = self._replace_members(attention, ffn, shape, lambda rank: ranks[rank].evict(self.number))
        self._ffn_times = {}
        costs = self.row_costs()
        self._ranks = [self._make_rank(costs) if rank is None else ranks[rank] for rank in kept]
        for rank in self._ranks:
            rank.costs = costs
        self._times = PassTimes(max(1, len(self._ranks)))
        self._work = [Work(0, 0, 0)] * len(self._ranks)
        self._look = [0] * len(self._ranks)
        self._begun = [0] * len(self._ranks)
        self._steady = []
        self._decoding = self._rows = 0
        self._unsteady = {index for index, rank in enumerate(self._ranks) if rank.outstanding}
        self._loads = [_load(rank) for rank in self._ranks]
        self._house()

    def use(self, micro_batches: int) -> None:
        if micro_batches != self.micro_batches:
            self.micro_batches = micro_batches
            self._unsteady.update(index for index, work in enumerate(self._work) if work.rows)

    def submit(self, job: Job) -> None:
        if not self._ranks or not self.ffn:
            self.homeless.append(job)
            return
        index = self._loads.index(min(self._loads))
        rank = self._ranks[index]
        rank.add(job)
        self._loads[index] = _load(rank)
        self._unsteady.add(index)

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
        self._log.passed(run.rounds, run.duration_ps, run.attention_ps, self._times.ffn_ps)
        self._log.decoded(self._decoding * run.rounds, run.duration_ps / run.rounds)
        self.number += run.rounds
        self.now_ps += run.duration_ps
        self._end(changed)

    def _begin(self, index: int) -> None:
        rank, before = self._ranks[index], self._work[index]
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
            rank = self._ranks[index]
            first, finished = rank.end(last)
            for job in first:
                job.first_ps = self.now_ps
                self._log.first_token(job, self.now_ps)
            for job in finished:
                self._log.finished(job, self.now_ps)
            self._loads[index] = _load(rank)
        self._unsteady |= due


def _load(rank: RoundRank) -> tuple[int, int]:
    return rank.outstanding, rank.outstanding_tokens
