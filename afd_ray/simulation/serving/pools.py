"""The pools of a simulated cluster: resizes phase by phase, losses, and what the actors cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from afd_ray.autoscaling import values
from afd_ray.autoscaling.values import Counts, Resize
from afd_ray.membership.events import Phase
from afd_ray.membership.steps import Deadlines
from afd_ray.simulation.serving.cluster import Cluster, Member
from afd_ray.simulation.serving.outcome import Change
from afd_ray.simulation.serving.resizing import Nodes, timetable
from afd_ray.simulation.serving.rounds import PS_PER_S
from afd_ray.simulation.serving.scene import Scene
from afd_ray.simulation.serving.stages import Shape

MOST_CHANGES = 10_000
"""That are remembered."""

At = Callable[[float, Callable[[], None]], None]
"""(seconds from now, what to do then)."""


@dataclass(slots=True)
class Transition:
    """A resize that is under way."""

    resize: Resize
    attention: list[Member]
    ffn: list[Member]
    reason: str
    new: list[Member] = field(default_factory=list)
    leaving: list[Member] = field(default_factory=list)


class Pools:
    """Who serves, who is on the way in, and since when."""

    def __init__(self, scene: Scene, cluster: Cluster, after: At) -> None:
        config = scene.config
        self.changes: list[Change] = []
        self.transition: Transition | None = None
        self.last: values.Outcome | None = None
        self.start_delay_s = 0.0
        """From the last growth's decision to its end."""
        self._settings, self._tensor_parallel = config.simulation, config.ffn.tensor_parallel
        self._detect_s = config.failure.detect_timeout_s
        self._deadlines = replace(Deadlines(), provide_s=config.placement.timeout_s, connect_s=config.handoff.start_timeout_s)
        self._cluster, self._after, self._nodes = cluster, after, Nodes(config.simulation)
        self._held_ps = self._billed_to_ps = 0

    @property
    def counts(self) -> Counts:
        return Counts(len(self._cluster.attention), len(self._cluster.ffn))

    @property
    def gpu_hours(self) -> float:
        """Of actors from when they are asked for to when they are gone, up to now."""
        self._bill()
        return self._held_ps / PS_PER_S / 3600

    @property
    def held(self) -> int:
        """Actors that are paid for."""
        return self._nodes.held

    def start(self, counts: Counts) -> None:
        """The first epoch, at once; raises ValueError when there is no room."""
        attention, ffn = self._take("attention", counts.attention), self._take("ffn", counts.ffn)
        if attention is None or ffn is None:
            raise ValueError(f"simulation.nodes: no room for the {counts} to start with")
        self._form(attention, ffn)

    def resize(self, wanted: Counts, reason: str) -> None:
        """Begins a resize; one must not be under way."""
        assert self.transition is None
        attention, ffn = list(self._cluster.attention), list(self._cluster.ffn)
        self._bill()
        added = self._take("attention", wanted.attention - len(attention)), self._take("ffn", wanted.ffn - len(ffn))
        new = [member for part in added for member in part or ()]
        self.transition = transition = Transition(
            Resize(wanted, self._now_s),
            attention[: wanted.attention] + (added[0] or []),
            ffn[: wanted.ffn] + (added[1] or []),
            reason,
            new,
            attention[wanted.attention :] + ffn[wanted.ffn :],
        )
        durations: dict[Phase, float] = {
            "provide": math.inf if None in added else self._nodes.start_delay_s(new),
            "load": self._settings.load_s,
            "connect": self._settings.connect_s,
        }
        plan = timetable(durations, self._deadlines)
        if plan.failed is None:
            self._after(plan.switch_s, lambda: self._switch(transition))
        else:
            self._after(plan.end_s, lambda: self.roll_back(plan.reason, transition))

    def roll_back(self, reason: str, transition: Transition | None = None) -> None:
        """Gives a resize up (None: whichever is under way); nothing when it is over."""
        if self.transition is None or transition not in (None, self.transition):
            return
        self._bill()
        self._nodes.release(self.transition.new)
        self._end(self.counts, self.transition.resize.to, "rolled_back", reason)

    def lose(self, role: str) -> None:
        """The youngest actor of the role dies: the others go on without it, once that is known, and a resize brings another one in."""
        pool = self._cluster.attention if role == "attention" else self._cluster.ffn
        if not pool:
            return
        wanted = self.transition.resize.to if self.transition else self.counts
        self.roll_back("an actor was lost")
        before, victim = self.counts, pool[-1]
        self._bill()
        attention = [member for member in self._cluster.attention if member != victim]
        ffn = [member for member in self._cluster.ffn if member != victim]
        whole = len(ffn) // self._tensor_parallel * self._tensor_parallel
        self._nodes.release([victim, *ffn[whole:]])
        self._cluster.take_back()
        self._form(attention, ffn[:whole])
        self._cluster.pause(round((self._detect_s + self._settings.recover_s) * PS_PER_S))
        self._record(Change(self._now_s, before, self.counts, "lost", f"{victim.name} failed"))
        self.resize(wanted, f"{victim.name} failed")

    @property
    def _now_s(self) -> float:
        return self._cluster.now_ps / PS_PER_S

    def _take(self, role: str, count: int) -> list[Member] | None:
        return self._nodes.take(role, count) if count > 0 else []

    def _form(self, attention: list[Member], ffn: list[Member]) -> None:
        self._cluster.form(attention, ffn, Shape(len(ffn) // self._tensor_parallel, self._tensor_parallel))

    def _switch(self, transition: Transition) -> None:
        if self.transition is not transition:
            return
        before = self.counts
        self._bill()
        self._form(transition.attention, transition.ffn)
        self._cluster.pause(round(self._settings.switch_pause_ms * PS_PER_S / 1000))
        self._nodes.release(transition.leaving)
        if transition.new:
            self.start_delay_s = self._now_s - transition.resize.since_s
        self._end(before, self.counts, "committed", transition.reason)

    def _end(self, before: Counts, after: Counts, outcome: str, reason: str) -> None:
        self.transition = None
        self.last = values.Outcome(after, outcome == "committed", self._now_s)
        self._record(Change(self._now_s, before, after, outcome, reason))

    def _record(self, change: Change) -> None:
        if len(self.changes) < MOST_CHANGES:
            self.changes.append(change)

    def _bill(self) -> None:
        self._held_ps += self._nodes.held * (self._cluster.now_ps - self._billed_to_ps)
        self._billed_to_ps = self._cluster.now_ps
