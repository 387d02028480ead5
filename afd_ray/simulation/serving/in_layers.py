"""Every layer of every micro-batch, one event after the other: what a live cluster does, with its own scheduler, conductor and choice of slots.

Attention ranks serve their slots one at a time, the FFN serves waves one at a time, slots go round on their own and wait for the other ranks of their
wave. For small clusters and short traces: days are `in_rounds`'s. All FFN ranks are taken for one that lasts as long as the slowest: where
rows are routed, instances that got none do not get ahead.
"""

import heapq
import math
import random
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

from afd_ray.engine.pipeline import Ready, micro_batches_for, next_slot
from afd_ray.engine.sequence import MicroBatch
from afd_ray.engine.stage_costs import FlightTimes, StageMeter
from afd_ray.engine.waves import Conductor, Wave
from afd_ray.simulation.serving.cluster import Cluster, Log, Member, Samples
from afd_ray.simulation.serving.jobs import Job, Work
from afd_ray.simulation.serving.rounds import PS_PER_US, picoseconds
from afd_ray.simulation.serving.scheduled import SlotRank, work_of
from afd_ray.simulation.serving.stages import Shape, StageModel

MakeRank = Callable[[], SlotRank]


class _Flight:
    """One micro-batch of an attention rank on its way through the layers."""

    __slots__ = (
        "batch",
        "began_ps",
        "context",
        "layer",
        "observed",
        "rows",
        "since",
        "spread",
        "stages_us",
        "transfer_ps",
        "under_way",
    )

    def __init__(self, batch: MicroBatch, began_ps: int, stages_us: Sequence[float], spread: float, transfer_ps: int) -> None:
        """`stages_us`: of attention, layer after layer, and then the head, on average; `spread` as `StageModel` has it. `transfer_ps`: one way."""
        self.batch, self.began_ps, self.stages_us, self.spread, self.transfer_ps = batch, began_ps, stages_us, spread, transfer_ps
        self.rows, self.context = batch.rows, context_of(batch)
        self.layer = self.since = 0
        self.under_way = False
        """At attention, at the FFN or in between: not waiting for its rank."""
        self.observed = FlightTimes()


class _Loop:
    """An attention rank's step loop."""

    def __init__(self, rank: SlotRank) -> None:
        self.rank = rank
        self.meter = StageMeter()
        self.flights: list[_Flight | None] = []
        self.parked: list[bool] = []
        self.busy = self.work_came = False
        self.arrivals = 0


class _Slot:
    """One micro-batch slot as the FFN sees it."""

    def __init__(self) -> None:
        self.wave: Wave | None = None
        self.layer = 0
        self.stages_us: Sequence[float] = ()
        """Of the wave's layers, on average."""
        self.spread = 0.0
        self.arrived: set[int] = set()
        """Attention ranks whose rows are here; those of the next wave may come early."""


class LayerCluster(Cluster):
    """Events on a heap, by time and then in the order in which they were foreseen."""

    plans_itself = True

    def __init__(
        self,
        stages: StageModel,
        layers: int,
        make_rank: MakeRank,
        log: Log,
        token_budget: int,
        slots: int,
        adaptive: bool,
        seed: int = 0,
    ) -> None:
        """`slots`: micro-batches in flight at most; `adaptive`: each rank uses as many of them as pay. `seed`: of what stages last."""
        super().__init__(stages, layers, log, token_budget)
        self.micro_batches = slots
        self._most, self._adaptive, self._make_rank = slots, adaptive, make_rank
        self._loops: list[_Loop] = []
        self._slots: list[_Slot] = []
        self._turns: list[int] = []
        self._conductor = Conductor(0, slots)
        self._ffn_busy = self._draining = False
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._foreseen = 0
        self._stirred: set[int] = set()
        """Ranks that have been given something, and have yet to look."""
        self._company = stages.company(1)
        self._random = random.Random(seed)

    @property
    def ranks(self) -> Sequence[SlotRank]:
        return [loop.rank for loop in self._loops]

    @property
    def busy(self) -> bool:
        return bool(self.ffn and (self._events or self._stirred))

    @property
    def work(self) -> list[Work]:
        return [self._work_of(loop) for loop in self._loops]

    def samples(self) -> Samples | None:
        layers = self._layers
        flights = [flight for loop in self._loops for flight in loop.flights if flight]
        waves = [(slot.wave.total_rows, sum(slot.stages_us) / layers) for slot in self._slots if slot.wave]
        if not flights or not waves:
            return None
        attention = [(flight.rows, flight.context, sum(flight.stages_us) / layers) for flight in flights]
        return Samples(attention, [(flight.rows, 2 * flight.transfer_ps / PS_PER_US) for flight in flights], waves[0])

    def use(self, micro_batches: int) -> None:
        raise ValueError("ranks that choose by themselves how many micro-batches they use are not told")

    def submit(self, job: Job) -> None:
        if not self._loops or not self.ffn:
            self.homeless.append(job)
            return
        loads = [(loop.rank.outstanding, loop.rank.outstanding_tokens) for loop in self._loops]
        index = loads.index(min(loads))
        self._loops[index].rank.add(job)
        self._stirred.add(index)

    def take_back(self) -> None:
        for loop in self._loops:
            loop.rank.scheduler.cancel_all()
            loop.flights = [None] * len(loop.flights)
        self._events = []

    def form(self, attention: Sequence[Member], ffn: Sequence[Member], shape: Shape) -> None:
        self._drain()
        loops, most = self._loops, self._most
        kept = self._replace_members(attention, ffn, shape, lambda rank: loops[rank].rank.drain())
        self._loops = [_Loop(self._make_rank()) if rank is None else loops[rank] for rank in kept]
        self._slots, self._turns = [_Slot() for _ in range(most)], list(range(most))
        self._conductor = Conductor(len(self._loops), most)
        self._ffn_busy = False
        for loop in self._loops:
            loop.rank.scheduler.reslot(most)
            loop.rank.scheduler.use(1 if self._adaptive else most)
            loop.flights, loop.parked, loop.busy = [None] * most, [True] * most, False
            loop.meter.forget_ffn()
        self._stirred = {index for index, loop in enumerate(self._loops) if loop.rank.outstanding}
        self._house()

    def advance(self, until_ps: int) -> None:
        stirred, self._stirred = sorted(self._stirred), set()
        for index in stirred:
            self._loops[index].work_came = True
            self._turn(index)
        while self._events and self._events[0][0] <= until_ps:
            self._next_event()
        if self._events:
            self.now_ps = until_ps

    def _drain(self) -> None:
        """To the step boundary: no micro-batch begins, those in flight go on to their end."""
        self._draining = True
        while self._events:
            self._next_event()
        self._draining = False

    def _next_event(self) -> None:
        self.now_ps, _, what, about = heapq.heappop(self._events)
        what(*about)

    def _after(self, duration_ps: int, what: Callable[..., None], *about: Any) -> None:
        self._foreseen += 1
        heapq.heappush(self._events, (self.now_ps + duration_ps, self._foreseen, what, about))

    # --- an attention rank --------------------------------------------------------------------------------------------------

    def _turn(self, index: int) -> None:
        """Unless the rank is busy it fills an empty slot, or goes on with the flight that is nearest to its token."""
        loop = self._loops[index]
        if loop.busy:
            return
        if loop.work_came and loop.rank.scheduler.has_work:
            for slot, flight in enumerate(loop.flights):
                if flight is None and self._begin(index, slot):
                    return
        loop.work_came = False
        chosen = next_slot([Ready(i, f.layer, f.since) for i, f in enumerate(loop.flights) if f and not f.under_way])
        if chosen is not None:
            self._attend(index, chosen)

    def _begin(self, index: int, slot: int) -> bool:
        """A new micro-batch; False, and the slot is parked, where there is nothing for it."""
        loop = self._loops[index]
        batch = None if self._draining else loop.rank.schedule(slot)
        if batch is None:
            if not loop.parked[slot]:
                loop.parked[slot] = True
                self._start(self._conductor.park(index, slot))
            return False
        transfer_ps = picoseconds(self._stages.transfer_us(batch.rows) / 2)
        spread = self._stages.attention_spread(batch.rows)
        loop.flights[slot] = _Flight(batch, self.now_ps, self._attention_us(index, batch), spread, transfer_ps)
        loop.parked[slot] = False
        self._meet()
        self._start(self._conductor.announce(index, slot, batch.rows))
        self._attend(index, slot)
        return True

    def _attention_us(self, index: int, batch: MicroBatch) -> list[float]:
        """Layer after layer, and then the head."""
        fixed_us, per_token_us = self._stages.attention_us(batch.rows)
        mean_us = self.attention[index].slowness * (fixed_us + per_token_us * context_of(batch))
        return [mean_us * share for share in self._stages.attention_by_layer(batch.rows, self._layers)]

    def _attend(self, index: int, slot: int) -> None:
        """The flight's next layer, or the head."""
        flight = self._flight(index, slot)
        us = self._company.attention * flight.stages_us[flight.layer] * self._chance(flight.spread)
        done = self._dispatch if flight.layer < self._layers else self._finish
        self._loops[index].busy = flight.under_way = True
        flight.observed.attended(us)
        self._after(picoseconds(us), done, index, slot)

    def _dispatch(self, index: int, slot: int) -> None:
        self._loops[index].busy = False
        self._after(self._transfer_ps(self._flight(index, slot)), self._arrive, index, slot)
        self._turn(index)

    def _return(self, index: int, slot: int, ffn_us: float) -> None:
        loop, flight = self._loops[index], self._flight(index, slot)
        flight.observed.returned(ffn_us + 2 * flight.transfer_ps / PS_PER_US, ffn_us, 0.0)
        flight.layer += 1
        flight.under_way = False
        loop.arrivals += 1
        flight.since = loop.arrivals
        self._turn(index)

    def _finish(self, index: int, slot: int) -> None:
        """The tokens, and the slot's next micro-batch."""
        loop, flight = self._loops[index], self._flight(index, slot)
        loop.busy, loop.flights[slot] = False, None
        self._meet()
        times = flight.observed
        self._log.passed(1, self.now_ps - flight.began_ps, picoseconds(times.attention), picoseconds(times.ffn))
        for job, last in loop.rank.complete(flight.batch):
            self._note(job, last)
        loop.meter.add(times, flight.rows, flight.context, self._layers)
        if slot == 0:
            self._replan(loop)
        loop.work_came = True
        if not self._begin(index, slot):
            self._turn(index)

    def _meet(self) -> None:
        """Who has work has changed, or may have."""
        self._company = self._stages.company(max(1, sum(any(loop.flights) for loop in self._loops)))

    def _chance(self, spread: float) -> float:
        """How many times as long as on average a stage lasts: log-normal, 1 in the mean, of this Gini coefficient.

        That one because the longer of two then lasts 1 + `spread` in the mean, however the real ones are distributed.
        """
        if not spread:
            return 1.0
        sigma = math.sqrt(2) * NormalDist().inv_cdf((1 + spread) / 2)
        return self._random.lognormvariate(-sigma * sigma / 2, sigma)

    def _transfer_ps(self, flight: _Flight) -> int:
        return round(self._company.transfer * flight.transfer_ps)

    def _flight(self, index: int, slot: int) -> _Flight:
        flight = self._loops[index].flights[slot]
        assert flight is not None
        return flight

    def _note(self, job: Job, last: bool) -> None:
        if job.produced == 1:
            job.first_ps = self.now_ps
            self._log.first_token(job, self.now_ps)
        else:
            self._log.decoded(1, self.now_ps - job.last_ps)
        job.last_ps = self.now_ps
        if last:
            self._log.finished(job, self.now_ps)

    def _replan(self, loop: _Loop) -> None:
        scheduler, costs = loop.rank.scheduler, loop.meter.costs
        scheduler.costs = costs.row
        if self._adaptive:
            scheduler.use(micro_batches_for(scheduler.load, costs, self._budget, scheduler.slots, scheduler.in_use))
            self.micro_batches = max(other.rank.scheduler.in_use for other in self._loops)

    def _work_of(self, loop: _Loop) -> Work:
        flying, scheduler = work_of([flight.batch for flight in loop.flights if flight]), loop.rank.scheduler
        return Work(scheduler.load.decoding, flying.prompt_rows, scheduler.context_tokens)

    # --- the FFN ------------------------------------------------------------------------------------------------------------

    def _start(self, wave: Wave | None) -> None:
        if wave is None:
            return
        slot, rows = self._slots[wave.slot], wave.total_rows
        slot.wave, slot.layer = wave, 0
        mean_us = self._stages.ffn_us(rows, self.shape) * self._slowest_ffn
        slot.stages_us = [mean_us * share for share in self._stages.ffn_by_layer(rows, self._layers)]
        slot.spread = self._stages.ffn_spread(rows)
        self._serve()

    def _arrive(self, index: int, slot: int) -> None:
        self._slots[slot].arrived.add(index)
        self._serve()

    def _serve(self) -> None:
        """The wave that is nearest to its end, of those whose rows are all here."""
        if self._ffn_busy:
            return
        slots = self._slots
        whole = [
            (n, i) for n, i in enumerate(self._turns) if (wave := slots[i].wave) and slots[i].arrived.issuperset(wave.members)
        ]
        index = next_slot([Ready(i, slots[i].layer, since) for since, i in whole])
        if index is None:
            return
        self._turns.remove(index)
        self._turns.append(index)
        us = self._company.ffn * slots[index].stages_us[slots[index].layer] * self._chance(slots[index].spread)
        self._ffn_busy = True
        self._after(picoseconds(us), self._pass_on, index, us)

    def _pass_on(self, index: int, us: float) -> None:
        slot = self._slots[index]
        wave = slot.wave
        assert wave is not None
        self._ffn_busy = False
        slot.arrived.difference_update(wave.members)
        for rank in wave.members:
            self._after(self._transfer_ps(self._flight(rank, index)), self._return, rank, index, us)
        slot.layer += 1
        if slot.layer == self._layers:
            slot.wave = None
            self._start(self._conductor.finish(index))
        self._serve()


def context_of(batch: MicroBatch) -> int:
    """Cached tokens of all rows' sequences, the rows' own included."""
    return sum(chunk.start + chunk.count for chunk in batch.chunks)
