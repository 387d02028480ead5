"""How long a simulated resize takes: the live protocol's phases and deadlines, one after the other."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from afd_ray.config import Simulation
from afd_ray.membership.events import Phase
from afd_ray.membership.steps import NAMES, STEPS, Deadlines
from afd_ray.simulation.serving.cluster import Member


class Timetable(NamedTuple):
    """Seconds from the decision."""

    switch_s: float
    """When every member is asked to switch; infinite when it never comes to that."""
    end_s: float
    failed: Phase | None = None
    """The phase that missed its deadline, so that the resize is rolled back."""

    @property
    def reason(self) -> str:
        return f"{NAMES[self.failed]} took too long" if self.failed else ""


def timetable(durations_s: Mapping[Phase, float], deadlines: Deadlines) -> Timetable:
    """Of a resize; phases that are not named take no time, one that never ends is infinite."""
    at_s = 0.0
    switch_s = float("inf")
    for phase in STEPS["resize"]:
        duration_s = durations_s.get(phase, 0.0)
        if phase == "switch":
            switch_s = at_s
        if duration_s > deadlines.of(phase, "resize"):
            return Timetable(switch_s, at_s + deadlines.of(phase, "resize"), phase)
        at_s += duration_s
    return Timetable(switch_s, at_s)


class Place(NamedTuple):
    """Where one actor fits."""

    slowness: float
    start_delay_s: float


class Nodes:
    """The machines, and who is on them. Places are taken in the order of the configuration, and without any listed there is always another."""

    def __init__(self, settings: Simulation) -> None:
        self._default = Place(1.0, settings.start_delay_s)
        self._free: list[Place] | None = None
        if settings.nodes:
            delays = [settings.start_delay_s if node.start_delay_s is None else node.start_delay_s for node in settings.nodes]
            places = [[Place(node.slowness, delay)] * node.actors for node, delay in zip(settings.nodes, delays, strict=True)]
            self._free = [place for group in places for place in group]
        self._taken: dict[Member, Place] = {}
        self._named = 0

    def take(self, role: str, count: int) -> list[Member] | None:
        """So many new actors, or None (and nothing taken) when there is no room for all."""
        if self._free is not None and count > len(self._free):
            return None
        members = []
        for _ in range(count):
            place = self._free.pop(0) if self._free is not None else self._default
            members.append(Member(f"{role}-{self._named}", place.slowness))
            self._taken[members[-1]] = place
            self._named += 1
        return members

    def release(self, members: Sequence[Member]) -> None:
        for member in members:
            place = self._taken.pop(member)
            if self._free is not None:
                self._free.insert(0, place)

    def start_delay_s(self, members: Sequence[Member]) -> float:
        """Until all of these serve."""
        return max((self._taken[member].start_delay_s for member in members), default=0.0)

    @property
    def held(self) -> int:
        """Actors that are paid for."""
        return len(self._taken)
