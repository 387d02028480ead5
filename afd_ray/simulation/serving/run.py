"""A trace against a cluster and a policy on a virtual clock."""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from afd_ray.autoscaling.guard import decide
from afd_ray.autoscaling.values import Counts, Goals, Observation, Outcome, Override, Policy, Resize, State
from afd_ray.config import Config
from afd_ray.engine.pipeline import Load, micro_batches_for
from afd_ray.membership.events import Phase
from afd_ray.membership.steps import Deadlines
from afd_ray.simulation.serving.cluster import Cluster, MakeRank, Member, stage_us
from afd_ray.simulation.serving.counted import CountedRank
from afd_ray.simulation.serving.jobs import Job
from afd_ray.simulation.serving.measures import Change, Course, Measures, Point, StageSampler, Tally, reversals
from afd_ray.simulation.serving.resizing import Nodes, Timetable, timetable
from afd_ray.simulation.serving.rounds import PS_PER_S
from afd_ray.simulation.serving.scheduled import ScheduledRank
from afd_ray.simulation.serving.stages import Shape, StageModel
from afd_ray.simulation.serving.traces import Arrival

AUTO_SLOTS = 4
"""Micro-batches that `pipeline.micro_batches: auto` may use."""
MOST_CHANGES = 10_000
DRAIN_S = 3600.0
"""What is left of the requests may take so long after the last one came."""

Progress = Callable[[float], None]
"""Told now and then how far the virtual clock has come, in seconds."""


class Scene(NamedTuple):
    """A cluster to simulate: the configuration, and what the machine under it would do."""

    config: Config
    stages: StageModel
    layers: int
    kv_blocks: int
    """Of each attention rank."""
    step_by_step: bool = False
    """Every sequence through the live scheduler, instead of counting them."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a policy did on a trace."""

    policy: str
    tally: Tally
    duration_s: float
    gpu_hours: float
    """Of all actors from when they are asked for to when they are gone."""
    changes: tuple[Change, ...]
    points: tuple[Point, ...]
    preemptions: int
    unfinished: int

    @property
    def attainment(self) -> float:
        """Share of all requests that met both targets; refused and unfinished ones did not."""
        return self.tally.within / self.tally.arrivals if self.tally.arrivals else 1.0

    @property
    def reversals(self) -> int:
        return reversals(self.changes)

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        tally = self.tally
        return {
            "policy": self.policy,
            "gpu_hours": round(self.gpu_hours, 3),
            "slo_attainment": round(self.attainment, 5),
            "tpot_ms": _named(tally.tpot_ms.quantiles(0.5, 0.95, 0.99)),
            "request_tpot_ms": _named(tally.request_tpot_ms.quantiles(0.5, 0.95, 0.99)),
            "ttft_ms": _named(tally.ttft_ms.quantiles(0.5, 0.95, 0.99)),
            "requests": tally.arrivals,
            "completed": tally.completions,
            "refused": tally.rejected,
            "unfinished": self.unfinished,
            "tokens": tally.tokens,
            "tokens_per_gpu_s": round(tally.tokens / (self.gpu_hours * 3600), 3) if self.gpu_hours else None,
            "duration_s": round(self.duration_s, 3),
            "resizes": sum(change.outcome == "committed" for change in self.changes),
            "rolled_back": sum(change.outcome == "rolled_back" for change in self.changes),
            "reversals": self.reversals,
            "preemptions": self.preemptions,
        }


def simulate(
    scene: Scene, arrivals: Iterator[Arrival], policy: Policy, *, name: str = "", seed: int = 0, progress: Progress | None = None
) -> Report:
    """The whole trace, and then what is left of it. The same for the same arguments."""
    return Simulation(scene, arrivals, policy, seed).run(name, progress)


@dataclass(slots=True)
class _Resizing:
    resize: Resize
    plan: Timetable
    attention: list[Member]
    ffn: list[Member]
    new: list[Member] = field(default_factory=list)
    gone: list[Member] = field(default_factory=list)
    reason: str = ""
    committed: bool = False


class Simulation:
    """The events around a `Cluster`: arrivals, decisions, the phases of resizes, failures."""

    def __init__(self, scene: Scene, arrivals: Iterator[Arrival], policy: Policy, seed: int = 0) -> None:
        config = scene.config
        self.scene, self.settings, self.policy = scene, config.simulation, policy
        self.measures = Measures(config.autoscaling.tpot_target_ms, config.autoscaling.ttft_target_ms, config.autoscaling.period_s)
        self.cluster = Cluster(scene.stages, scene.layers, _rank_maker(scene), self.measures, config.pipeline.max_tokens_per_micro_batch)
        self.nodes = Nodes(self.settings)
        self.goals = goals_of(config)
        self.changes: list[Change] = []
        self.course = Course()
        self.state: State = {}
        self.override: Override | None = None
        self._arrivals, self._random = arrivals, np.random.default_rng(seed)
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order, self._numbers = count(), count()
        self._sampler = StageSampler()
        self._resizing: _Resizing | None = None
        self._last: Outcome | None = None
        self._wanted = Counts(config.attention.replicas, config.ffn.ranks)
        self._start_delay_s = 0.0
        self._held_ps = 0
        self._billed_to_ps = 0
        self._ended = False
        self._outstanding = 0

    @property
    def now_s(self) -> float:
        return self.cluster.now_ps / PS_PER_S

    @property
    def counts(self) -> Counts:
        return Counts(len(self.cluster.attention), len(self.cluster.ffn))

    def run(self, name: str = "", progress: Progress | None = None) -> Report:
        self._start()
        looked = 0
        while self._events and not self._over():
            self._step()
            looked += 1
            if progress is not None and looked % 1000 == 0:
                progress(self.now_s)
        self._bill()
        self.measures.turn()
        hours = self._held_ps / PS_PER_S / 3600
        preemptions = sum(rank.preemptions for rank in self.cluster.ranks)
        return Report(
            name, self.measures.whole, self.now_s, hours, tuple(self.changes), tuple(self.course.points), preemptions, self._outstanding
        )

    def at(self, time_s: float, what: Callable[[], None]) -> None:
        """Do this at that time of the virtual clock, or as soon after as a round ends."""
        heapq.heappush(self._events, (round(time_s * PS_PER_S), next(self._order), what))

    def set_by_hand(self, counts: Counts) -> None:
        """An operator asks for these counts, as with `afd-ray scale`."""
        self.override = Override(counts, self.now_s + self.scene.config.autoscaling.override_s)
        if self._resizing is None:
            self._begin_resize(counts, "asked for by hand")

    # --- time -------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        members = self.nodes.take("attention", self._wanted.attention), self.nodes.take("ffn", self._wanted.ffn)
        if members[0] is None or members[1] is None:
            raise ValueError(f"simulation.nodes: no room for {self._wanted} to start with")
        self.cluster.form(*members, self._shape(len(members[1])))
        self._next_arrival()
        self.at(self.scene.config.autoscaling.period_s, self._tick)
        for failure in self.settings.failures:
            self.at(failure.at_s, lambda role=failure.role: self._fail(role))  # type: ignore[misc]
        self._expect_failure()

    def _step(self) -> None:
        cluster, next_ps = self.cluster, self._events[0][0]
        if cluster.now_ps < next_ps:
            if cluster.busy:
                cluster.advance(next_ps)
            if not cluster.busy:
                cluster.now_ps = max(cluster.now_ps, next_ps)
        while self._events and self._events[0][0] <= cluster.now_ps:
            heapq.heappop(self._events)[2]()

    def _over(self) -> bool:
        if not self._ended:
            return False
        return self.measures.queued == 0 and not self.cluster.busy or self.now_s > self._last_arrival_s + DRAIN_S

    # --- requests ---------------------------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._ended, self._last_arrival_s = True, self.now_s
            return
        self.at(arrival.at_s, lambda: self._arrive(arrival))

    def _arrive(self, arrival: Arrival) -> None:
        limit = self._context_limit
        if arrival.prompt + 1 > limit or self.measures.queued >= self.scene.config.server.max_queued_requests:
            self.measures.refused()
        else:
            self.measures.came(arrival.prompt)
            output = min(arrival.output, limit - arrival.prompt)
            self.cluster.submit(Job(next(self._numbers), round(arrival.at_s * PS_PER_S), arrival.prompt, output))
        self._next_arrival()

    @property
    def _context_limit(self) -> int:
        held = self.scene.kv_blocks * self.scene.config.attention.kv_cache.block_size
        return min(held, self.scene.config.model.max_context or held)

    # --- decisions --------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        observation = self.observe()
        self._note(observation)
        past = self.measures.turn()
        del past
        self._replan()
        decision = decide(self.policy, observation, self.state, self.now_s)
        self.state = decision.state
        if decision.give_up:
            self._roll_back("given up by the policy")
        elif decision.counts != observation.counts and self._resizing is None and not self._overridden:
            self._begin_resize(decision.counts, decision.reason)
        if not self._over():
            self.at(self.now_s + self.scene.config.autoscaling.period_s, self._tick)

    @property
    def _overridden(self) -> bool:
        return self.override is not None and self.now_s < self.override.until_s

    def observe(self) -> Observation:
        """What the policy sees now."""
        cluster, recent, period_s = self.cluster, self.measures.recent, self.scene.config.autoscaling.period_s
        oldest = [at for rank in cluster.ranks if (at := rank.oldest_waiting_ps) is not None]
        oldest += [job.arrived_ps for job in cluster.homeless]
        tpot_ms, ttft_ms = self.measures.latencies()
        self._sample()
        return Observation(
            counts=self.counts,
            goals=self.goals,
            running=sum(rank.running for rank in cluster.ranks),
            waiting=sum(rank.waiting for rank in cluster.ranks) + len(cluster.homeless),
            context_tokens=sum(work.context_tokens for work in cluster.work),
            kv_used=max((rank.kv_used for rank in cluster.ranks), default=0.0),
            arrivals_s=recent.arrivals / period_s,
            prompt_tokens_s=recent.prompt_tokens / period_s,
            output_tokens_s=recent.tokens / period_s,
            completions_s=recent.completions / period_s,
            queue_wait_s=(cluster.now_ps - min(oldest)) / PS_PER_S if oldest else None,
            tpot_ms=tpot_ms,
            ttft_ms=ttft_ms,
            stages=self.measures.stages(self.scene.layers, cluster.micro_batches),
            costs=self._sampler.meter.costs,
            layers=self.scene.layers,
            micro_batches=_slots(self.scene.config),
            start_delay_s=self._start_delay_s,
            resize=self._resizing.resize if self._resizing else None,
            last_resize=self._last,
            override=self.override if self._overridden else None,
        )

    def _note(self, observation: Observation) -> None:
        tpot, ttft = observation.tpot_ms, observation.ttft_ms
        self.course.add(
            Point(
                round(self.now_s, 3),
                *observation.counts,
                observation.requests,
                observation.waiting,
                observation.arrivals_s,
                tpot.p95 if tpot else None,
                ttft.p95 if ttft else None,
            )
        )

    def _sample(self) -> None:
        """Stage times of the present rounds, for the cost lines."""
        cluster, layers, slots = self.cluster, self.scene.layers, self.cluster.micro_batches
        rows = sum(work.rows for work in cluster.work) / slots
        if not rows or not cluster.busy:
            return
        stages = self.scene.stages
        attention = []
        for member, work in zip(cluster.attention, cluster.work, strict=True):
            if work.rows:
                fixed_us, per_token_us = stages.attention_us(work.rows / slots)
                context = work.context_tokens / slots
                attention.append((work.rows / slots, context, member.slowness * (fixed_us + per_token_us * context)))
        most = max(work.rows for work in cluster.work) / slots
        self._sampler.sample(attention, rows, stage_us(cluster.ffn_ps(round(rows * slots)), layers), stages.transfer_us(most))

    def _replan(self) -> None:
        """As an attention rank does: as many micro-batches as pay."""
        cluster, wanted = self.cluster, self.scene.config.pipeline.micro_batches
        if wanted != "auto":
            cluster.use(wanted)
            return
        busiest = max(cluster.work, key=lambda work: work.rows, default=None)
        if busiest is None or not busiest.rows:
            return
        load = Load(busiest.decoding, busiest.decoding, busiest.context_tokens, busiest.prompt_rows)
        costs = self._sampler.meter.costs
        ranks = max(1, sum(work.rows > 0 for work in cluster.work))
        mine = costs._replace(ffn=costs.ffn._replace(per_row_us=costs.ffn.per_row_us * ranks))
        budget = self.scene.config.pipeline.max_tokens_per_micro_batch
        cluster.use(micro_batches_for(load, mine, budget, AUTO_SLOTS, cluster.micro_batches))

    # --- resizes ----------------------------------------------------------------------------------------------------------

    def _begin_resize(self, wanted: Counts, reason: str) -> None:
        self._wanted = wanted
        attention, ffn = list(self.cluster.attention), list(self.cluster.ffn)
        self._bill()
        new = self._take("attention", wanted.attention - len(attention)), self._take("ffn", wanted.ffn - len(ffn))
        gone = attention[wanted.attention :] + ffn[wanted.ffn :]
        lacking = new[0] is None or new[1] is None
        taken = [member for part in new for member in part or []]
        durations: dict[Phase, float] = {
            "provide": math.inf if lacking else self.nodes.start_delay_s(taken),
            "load": self.settings.load_s,
            "connect": self.settings.connect_s,
        }
        plan = timetable(durations, self._deadlines)
        resizing = _Resizing(
            Resize(wanted, self.now_s),
            plan,
            attention[: wanted.attention] + (new[0] or []),
            ffn[: wanted.ffn] + (new[1] or []),
            taken,
            gone,
            reason,
        )
        self._resizing = resizing
        if plan.failed is None:
            self.at(self.now_s + plan.switch_s, lambda: self._switch(resizing))
        else:
            self.at(self.now_s + plan.end_s, lambda: self._roll_back(plan.reason, resizing))

    def _take(self, role: str, count: int) -> list[Member] | None:
        return self.nodes.take(role, count) if count > 0 else []

    @property
    def _deadlines(self) -> Deadlines:
        config = self.scene.config
        return replace(Deadlines(), provide_s=config.placement.timeout_s, connect_s=config.handoff.start_timeout_s)

    def _switch(self, resizing: _Resizing) -> None:
        if self._resizing is not resizing:
            return
        before = self.counts
        self._bill()
        self.cluster.form(resizing.attention, resizing.ffn, self._shape(len(resizing.ffn)))
        self.cluster.pause(round(self.settings.switch_pause_ms * PS_PER_S / 1000))
        self.nodes.release(resizing.gone)
        if resizing.new:
            self._start_delay_s = self.now_s - resizing.resize.since_s
        if before.ffn != self.counts.ffn:
            self._sampler.meter.forget_ffn()
        self._end_resize(before, "committed", resizing.reason)

    def _roll_back(self, reason: str, resizing: _Resizing | None = None) -> None:
        if self._resizing is None or resizing not in (None, self._resizing):
            return
        self._bill()
        self.nodes.release(self._resizing.new)
        self._end_resize(self.counts, "rolled_back", reason)

    def _end_resize(self, before: Counts, outcome: str, reason: str) -> None:
        assert self._resizing is not None
        wanted = self._resizing.resize.to
        self._last = Outcome(wanted, outcome == "committed", self.now_s)
        self._resizing = None
        self._record(Change(self.now_s, before, self.counts if outcome == "committed" else wanted, outcome, reason))

    def _record(self, change: Change) -> None:
        if len(self.changes) < MOST_CHANGES:
            self.changes.append(change)

    def _shape(self, ffn: int) -> Shape:
        tensor_parallel = self.scene.config.ffn.tensor_parallel
        return Shape(ffn // tensor_parallel, tensor_parallel)

    # --- failures ---------------------------------------------------------------------------------------------------------

    def _expect_failure(self) -> None:
        hours = self.settings.mean_hours_between_failures
        if hours is not None:
            wait_s = self._random.exponential(hours * 3600 / max(1, self.nodes.held))
            self.at(self.now_s + wait_s, self._fail_any)

    def _fail_any(self) -> None:
        attention, ffn = self.counts
        self._fail("attention" if self._random.random() * (attention + ffn) < attention else "ffn")
        if not self._ended:
            self._expect_failure()

    def _fail(self, role: str) -> None:
        """The last actor of the role dies: the others go on without it, once that is known, and a resize brings another one in."""
        pool = self.cluster.attention if role == "attention" else self.cluster.ffn
        if not pool:
            return
        if self._resizing is not None:
            self._roll_back("an actor was lost")
        before, victim = self.counts, pool[-1]
        self._bill()
        self.nodes.release([victim])
        attention = [member for member in self.cluster.attention if member != victim]
        ffn = [member for member in self.cluster.ffn if member != victim]
        whole = len(ffn) // self.scene.config.ffn.tensor_parallel * self.scene.config.ffn.tensor_parallel
        self.cluster.form(attention, ffn[:whole], self._shape(whole))
        self.nodes.release(ffn[whole:])
        pause_s = self.scene.config.failure.detect_timeout_s + self.settings.recover_s
        self.cluster.pause(round(pause_s * PS_PER_S))
        self._record(Change(self.now_s, before, self.counts, "lost", f"{victim.name} failed"))
        self._begin_resize(before, f"{victim.name} failed")

    def _bill(self) -> None:
        """Actor time up to now."""
        weight = self.nodes.held
        self._held_ps += weight * (self.cluster.now_ps - self._billed_to_ps)
        self._billed_to_ps = self.cluster.now_ps


def goals_of(config: Config) -> Goals:
    """The configuration's `autoscaling` section, as policies are given it."""
    scaling = config.autoscaling
    return Goals(
        tpot_ms=scaling.tpot_target_ms,
        ttft_ms=scaling.ttft_target_ms,
        least=Counts(scaling.min.attention, scaling.min.ffn),
        most=Counts(scaling.max.attention, scaling.max.ffn),
        ffn_step=config.ffn.tensor_parallel,
        resize_deadline_s=scaling.resize_deadline_s,
        options=scaling.options,
    )


def _slots(config: Config) -> int:
    wanted = config.pipeline.micro_batches
    return AUTO_SLOTS if wanted == "auto" else wanted


def _rank_maker(scene: Scene) -> MakeRank:
    config = scene.config
    kind = ScheduledRank if scene.step_by_step else CountedRank
    return lambda costs: kind(
        blocks=scene.kv_blocks,
        block_size=config.attention.kv_cache.block_size,
        budget=config.pipeline.max_tokens_per_micro_batch,
        max_running=config.pipeline.max_running_requests,
        costs=costs,
    )


def _named(values: tuple[float, ...] | None) -> dict[str, float] | None:
    return {name: round(value, 3) for name, value in zip(("p50", "p95", "p99"), values, strict=True)} if values else None
