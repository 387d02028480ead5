"""Everything of one simulated cluster, and what can be done to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afd_ray.membership.attempts import Journal
from afd_ray.membership.events import Asked, Record, Withdrawn
from afd_ray.membership.protocol import Coordinator
from afd_ray.membership.seat import Seat
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import Deadlines
from afd_ray.simulation.protocol.checks import Checks
from afd_ray.simulation.protocol.controller import Controller
from afd_ray.simulation.protocol.ingress import Ingress
from afd_ray.simulation.protocol.members import FFN, Attention, Member
from afd_ray.simulation.protocol.world import DETECT_S, HOLD_S, World


@dataclass(frozen=True, slots=True)
class Parts:
    """What is tested; a test puts broken ones here."""

    coordinator: Callable[[Deadlines], Coordinator] = Coordinator
    seat: Callable[[str], Seat] = Seat
    journal: Callable[[], Journal] = Journal


class Cluster:
    """Processes, the controller's record, and what the world tells each of the others."""

    def __init__(self, world: World, parts: Parts) -> None:
        self.world, self.parts = world, parts
        self.members: dict[str, Member] = {}
        self.ended: set[str] = set()
        """Ids that were killed: none of them comes up (again)."""
        self.deaf: dict[str, list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}
        """Members that the controller cannot reach, with the messages that wait for it."""
        self.slowness = 0.0
        """How likely a call is slow beyond its deadline."""
        self.stuck = 0.0
        """How likely a call is never answered, though the process lives."""
        self.failing: frozenset[str] = frozenset()
        """Calls that fail now and then."""
        self.impatience = 0.0
        """How likely somebody who asked does not wait for the answer."""
        self.scarcity = 0.0
        """How likely there is no room for new members."""
        self.repeats = 0.0
        """How likely the controller hears something twice."""
        self.ambush: tuple[str, Callable[[], None]] | None = None
        """A phase, and what happens to the first change that comes to it."""
        self.record = Record()
        self.checks = Checks(self)
        self.controller = Controller(self, 1)
        self.ingresses = 1
        self.ingress = Ingress(world, "ingress-1", self)
        self.asks = 0
        self.settled_s = 0.0

    # --- what clients do ------------------------------------------------------------------------------------------------------

    def request(self, request: int, length: int) -> None:
        self.checks.requested(request)
        if self.ingress.alive:
            self.ingress.request(request, length)
        else:
            self.checks.failed(request)

    def scale(self, shape: Shape) -> None:
        self.asks += 1
        ask_id = f"ask-{self.asks}"
        if self.world.random.random() < self.impatience:
            self.world.after(self.world.delay(0.0, 3.0), self._withdraw, ask_id)
        if self.controller.alive:
            self.checks.asks[ask_id] = (self.controller.incarnation, shape)
        self.controller.on(Asked(ask_id, shape))

    def _withdraw(self, ask_id: str) -> None:
        self.controller.on(Withdrawn(ask_id, "it has taken too long"))

    # --- processes ------------------------------------------------------------------------------------------------------------

    def provide(self, number: int, names: tuple[str, ...], controller: Controller) -> None:
        """Start these; all of them or, as the world has it, an error after some."""
        random = self.world.random.random
        scarce = self.world.faulty and random() < self.scarcity
        slowest_s = 0.0
        for name in names[: len(names) // 2] if scarce else names:
            takes_s = 0.05 + 0.4 * random()
            if self.world.faulty and random() < self.slowness:
                takes_s += 5.0 * random()
            slowest_s = max(slowest_s, takes_s)
            self.world.after(takes_s, self._start, name)
        self.world.after(slowest_s + 0.01, self._started, number, names, controller, scarce)

    def _start(self, name: str) -> None:
        if name not in self.ended and name not in self.members:
            self.members[name] = (Attention if name.startswith("attention") else FFN)(self.world, name, self)

    def _started(self, number: int, names: tuple[str, ...], controller: Controller, scarce: bool) -> None:
        up = all(name in self.members and self.members[name].alive for name in names)
        controller.provided(number, names, "no room" if scarce else None if up else "a process has died")

    def kill(self, name: str, reason: str = "killed") -> None:
        """kill -9: links and streams break, and the controller hears of it."""
        member = self.members.get(name)
        if member is None or not member.alive:
            return
        if self.world.tracing:
            self.world.note(f"{name} is dead: {reason}")
        for number in list(member.edges):
            member.close(number)
        member.alive = False
        stream = self.ingress.streams.get(name)
        if stream is not None:
            stream.snap()
        self.world.after(self.world.delay(0.01, 0.1), self._tell_lost, name, reason)

    def end(self, name: str, controller: Controller) -> None:
        """A release has come to the member's machine; the stop of a process does not keep it alive, a cut connection does."""
        if name in self.deaf:
            self.deaf[name].append((self.end, (name, controller)))
            return
        self.ended.add(name)
        self.kill(name, "released")
        self.world.after(self.world.delay(0.001, 0.02), controller.gone, name)

    def pause(self, name: str) -> None:
        member = self.members.get(name)
        if member is not None and member.alive and not member.paused:
            self.world.note(f"{name} is stopped")
            member.pause()
            self.look(name, self.controller)

    def go_on(self, name: str) -> None:
        member = self.members.get(name)
        if member is not None and member.paused:
            self.world.note(f"{name} goes on")
            member.go_on()

    def look(self, name: str, controller: Controller) -> None:
        """The controller begins to watch this member, or the member falls silent: when it will be found lost, if it stays so."""
        member = self.members.get(name)
        if member is None or not member.alive:
            self.world.after(self.world.delay(0.01, 0.1), controller.lost, name, "it is not there")
        elif member.paused or name in self.deaf:
            self.world.after(DETECT_S, self._silent, name, controller)

    def _silent(self, name: str, controller: Controller) -> None:
        member = self.members.get(name)
        silent = member is not None and (name in self.deaf or (member.paused and self.world.now - member.paused_at >= DETECT_S))
        if silent:
            controller.lost(name, f"silent for {DETECT_S:g} s")

    def _tell_lost(self, name: str, reason: str) -> None:
        self.controller.lost(name, reason)

    # --- links ----------------------------------------------------------------------------------------------------------------

    def cut(self, one: str, other: str) -> None:
        """The link between two members, or an ingress and a member, carries nothing until it is healed; what was connected breaks."""
        self.world.note(f"link {one} - {other} is cut")
        self.world.cut(one, other)
        for name, peer in ((one, other), (other, one)):
            member = self.members.get(name)
            if member is not None:
                for number, edges in list(member.edges.items()):
                    if peer in edges:
                        member.after(self.world.delay(0.001, 0.3), member.broke, number, peer)
        for stream in list(self.ingress.streams.values()):
            if {stream.member.name, self.ingress.name} == {one, other}:
                stream.snap()

    def heal(self, one: str, other: str) -> None:
        self.world.note(f"link {one} - {other} is healed")
        self.world.heal(one, other)

    def deafen(self, name: str) -> None:
        """Cut a member off from the controller."""
        if name not in self.deaf and name in self.members:
            self.world.note(f"{name} is cut off from the controller")
            self.deaf[name] = []
            self.look(name, self.controller)

    def undeafen(self, name: str) -> None:
        for action, args in self.deaf.pop(name, []):
            self.world.after(self.world.delay(0.001, 0.02), action, *args)

    # --- controller and ingress -----------------------------------------------------------------------------------------------

    def kill_controller(self) -> None:
        if self.controller.alive:
            self.world.note(f"controller {self.controller.incarnation} is dead")
            self.controller.alive = False
            away_s = self.world.delay(0.1, 1.0)
            if self.world.faulty and self.world.random.random() < 0.25:
                away_s += self.world.delay(0.0, 2 * HOLD_S)  # long enough for drained members to go on by themselves
            self.world.after(away_s, self._restart_controller)

    def _restart_controller(self) -> None:
        self.controller = Controller(self, self.controller.incarnation + 1)
        self.controller.adopt()

    def kill_ingress(self) -> None:
        if self.ingress.alive:
            self.world.note(f"{self.ingress.name} is dead")
            self.ingress.die()
            self.world.after(self.world.delay(0.1, 0.5), self._restart_ingress)

    def _restart_ingress(self) -> None:
        self.ingresses += 1
        self.ingress = Ingress(self.world, f"ingress-{self.ingresses}", self)
        if self.controller.alive:
            self.controller.publish()

    def publish(self, version: tuple[int, int], coordinator: Coordinator) -> None:
        """What an ingress is answered some time later."""
        ingress = self.ingress
        ingress.after(self.world.delay(0.001, 0.03), ingress.view, version, coordinator.takers, coordinator.leaving)
