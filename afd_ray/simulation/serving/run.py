"""A trace against a cluster and a policy on a virtual clock."""

import heapq
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from afd_ray.autoscaling.guard import decide
from afd_ray.autoscaling.values import Counts, Override, Policy, State
from afd_ray.simulation.serving.jobs import Job
from afd_ray.simulation.serving.measures import Measures
from afd_ray.simulation.serving.outcome import Failures, Outcome
from afd_ray.simulation.serving.pools import Pools
from afd_ray.simulation.serving.rounds import PS_PER_S
from afd_ray.simulation.serving.scene import Scene
from afd_ray.simulation.serving.traces import Arrival
from afd_ray.simulation.serving.watching import Watch

DRAIN_S = 3600.0
"""What is left of the requests may take so long after the last one came."""
PLAN_S = 1.0
"""From one choice of the number of micro-batches to the next."""
STEPS_A_REPORT = 1000

Progress = Callable[[float], None]
"""Told now and then how far the virtual clock has come, in seconds."""


def simulate(
    scene: Scene, arrivals: Iterator[Arrival], policy: Policy, *, name: str = "", seed: int = 0, progress: Progress | None = None
) -> Outcome:
    """The whole trace, and then what is left of it. The same for the same arguments."""
    return Simulation(scene, arrivals, policy, seed).run(name, progress)


class Simulation:
    """The events around a `Cluster`: arrivals, decisions, the phases of resizes, failures."""

    def __init__(self, scene: Scene, arrivals: Iterator[Arrival], policy: Policy, seed: int = 0) -> None:
        config, scaling = scene.config, scene.config.autoscaling
        self.measures = Measures(scaling.tpot_target_ms, scaling.ttft_target_ms, scaling.period_s)
        self.cluster = scene.cluster(self.measures, seed)
        self.pools = Pools(scene, self.cluster, lambda wait_s, what: self.at(self.now_s + wait_s, what))
        self.watch = Watch(scene, self.cluster, self.pools, self.measures)
        self.state: State = {}
        """The policy's."""
        self._scene, self._config, self._policy = scene, config, policy
        self._arrivals, self._random = arrivals, np.random.default_rng(seed)
        self._failures = Failures()
        self._override: Override | None = None
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order, self._numbers = count(), count()
        self._last_arrival_s: float | None = None

    @property
    def now_s(self) -> float:
        return self.cluster.now_ps / PS_PER_S

    def run(self, name: str = "", progress: Progress | None = None) -> Outcome:
        self._start()
        steps = 0
        while self._events and not self._over:
            self._step()
            steps += 1
            if progress is not None and steps % STEPS_A_REPORT == 0:
                progress(self.now_s)
        self.measures.turn()
        ranks, pools = self.cluster.ranks, self.pools
        return Outcome(
            policy=name,
            tally=self.measures.whole,
            duration_s=self.now_s,
            gpu_hours=pools.gpu_hours,
            changes=tuple(pools.changes),
            points=tuple(self.watch.course.points),
            preemptions=sum(rank.preemptions for rank in ranks),
            unfinished=self.cluster.outstanding,
            failures=self._failures,
        )

    def at(self, time_s: float, what: Callable[[], None]) -> None:
        """Do this at that time of the virtual clock, or as soon after as a round ends."""
        heapq.heappush(self._events, (round(time_s * PS_PER_S), next(self._order), what))

    def set_by_hand(self, counts: Counts) -> None:
        """An operator asks for these counts, as with `afd-ray scale`."""
        self._override = Override(counts, self.now_s + self._config.autoscaling.override_s)
        if self.pools.transition is None:
            self.pools.resize(counts, "asked for by hand")

    # --- time -------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        settings = self._config.simulation
        self.pools.start(Counts(self._config.attention.replicas, self._config.ffn.ranks))
        self._next_arrival()
        self.at(self._config.autoscaling.period_s, self._tick)
        if not self.cluster.plans_itself:
            self.at(PLAN_S, self._replan)
        for failure in settings.failures:
            self.at(failure.at_s, lambda role=failure.role: self.pools.lose(role))  # type: ignore[misc]
        self._expect_failure()

    def _step(self) -> None:
        """Rounds up to the next event, and what happens then."""
        cluster, next_ps = self.cluster, self._events[0][0]
        if cluster.now_ps < next_ps and cluster.busy:
            cluster.advance(next_ps)
        if cluster.now_ps < next_ps and not cluster.busy and not self._over:
            cluster.now_ps = next_ps
        while self._events and self._events[0][0] <= cluster.now_ps:
            heapq.heappop(self._events)[2]()

    @property
    def _over(self) -> bool:
        if self._last_arrival_s is None:
            return False
        return not self.cluster.outstanding or self.now_s > self._last_arrival_s + DRAIN_S

    # --- what happens -----------------------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._last_arrival_s = self.now_s
        else:
            self.at(arrival.at_s, lambda: self._arrive(arrival))

    def _arrive(self, arrival: Arrival) -> None:
        limit = self._scene.context_limit
        if arrival.prompt + 1 > limit or self.measures.queued >= self._config.server.max_queued_requests:
            self.measures.refused()
        else:
            self.measures.came(arrival.prompt)
            output = min(arrival.output, limit - arrival.prompt)
            self.cluster.submit(Job(next(self._numbers), round(arrival.at_s * PS_PER_S), arrival.prompt, output))
        self._next_arrival()

    def _tick(self) -> None:
        if self._override is not None and self.now_s >= self._override.until_s:
            self._override = None
        observation = self.watch.look(self._override)
        decision = decide(self._policy, observation, self.state, self.now_s)
        self.state = decision.state
        self._failures = self._failures.plus(decision.failed, decision.reason)
        if decision.give_up:
            self.pools.roll_back("given up by the policy")
        elif decision.counts != observation.counts and self.pools.transition is None:
            self.pools.resize(decision.counts, decision.reason)
        self.at(self.now_s + self._config.autoscaling.period_s, self._tick)

    def _replan(self) -> None:
        """An attention rank does it at every token; a second later is soon enough."""
        self.cluster.use(self.watch.micro_batches())
        self.at(self.now_s + PLAN_S, self._replan)

    def _expect_failure(self) -> None:
        hours = self._config.simulation.mean_hours_between_failures
        if hours is not None:
            wait_s = self._random.exponential(hours * 3600 / self.pools.held)
            self.at(self.now_s + wait_s, self._fail)

    def _fail(self) -> None:
        counts = self.pools.counts
        self.pools.lose("attention" if self._random.random() * sum(counts) < counts.attention else "ffn")
        self._expect_failure()
