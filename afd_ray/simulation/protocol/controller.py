"""The controller's shell on the virtual clock: does the coordinator's effects one by one, and may die between any two."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from afd_ray.membership.events import (
    Adopted,
    Answered,
    Ask,
    Asked,
    Deadline,
    Done,
    Effect,
    Event,
    Gone,
    Late,
    Lost,
    Op,
    Provide,
    Provided,
    Publish,
    Release,
    Store,
    Unlinked,
    Unprovided,
    Watch,
)
from afd_ray.simulation.protocol.world import DEADLINES

if TYPE_CHECKING:
    from afd_ray.simulation.protocol.cluster import Cluster

OP_S: dict[str, tuple[float, float]] = {
    "load": (0.01, 0.2),
    "prepare": (0.005, 0.05),
    "connect": (0.01, 0.08),
    "switch": (0.0, 0.4),
}
"""How long a member takes for what takes long."""


class Controller:
    """One incarnation; the next one goes on from the record."""

    def __init__(self, cluster: "Cluster", incarnation: int) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.incarnation = incarnation
        self.alive = True
        self.coordinator = cluster.parts.coordinator(DEADLINES)
        self.dies_in: int | None = None
        """After so many more effects."""
        self.watched: set[str] = set()
        self._watching: set[int] = set()
        self._views = 0
        self._calls: dict[str, float] = {}
        """When the last call to each member arrives: they start in order."""
        self._shown: tuple[Any, ...] = ()
        self._does: dict[type[Any], Callable[[Any], None]] = {
            Store: self._store,
            Provide: self._provide,
            Ask: self._ask,
            Watch: self._watch,
            Release: self._release,
            Deadline: self._deadline,
            Publish: self._publish,
            Done: self._done,
        }

    def adopt(self) -> None:
        self.on(Adopted(self.cluster.record))

    def on(self, event: Event) -> None:
        if not self.alive:
            return
        tracing = self.world.tracing
        if tracing:
            self.world.note(f"controller {self.incarnation} <- {brief(event)}")
        effects = self.coordinator.on(event)
        self.cluster.checks.decided(self.coordinator)
        change, ambush = self.coordinator.change, self.cluster.ambush
        if ambush is not None and change is not None and change.phase == ambush[0]:
            self.cluster.ambush = None
            ambush[1]()
        for effect in effects:
            if self.dies_in is not None:
                self.dies_in -= 1
                if self.dies_in < 0:
                    self.cluster.kill_controller()
                    return
            if tracing:
                self.world.note(f"controller {self.incarnation} -> {brief(effect)}")
            self._does[type(effect)](effect)
        if not isinstance(event, Adopted | Asked) and self.world.random.random() < self.cluster.repeats:
            self.later(self.world.delay(0.0, 0.5), event)

    def later(self, delay_s: float, event: Event) -> None:
        self.world.after(delay_s, self.on, event)

    # --- effects --------------------------------------------------------------------------------------------------------------

    def _store(self, effect: Store) -> None:
        self.cluster.record = effect.record
        self.cluster.checks.stored(effect.record)

    def _provide(self, effect: Provide) -> None:
        members = effect.attention + tuple(member for group in effect.ffn for member in group)
        self.cluster.provide(effect.number, members, self)

    def _ask(self, effect: Ask) -> None:
        self.cluster.checks.asked(effect)
        low_s, high_s = OP_S.get(effect.op, (0.0, 0.01))
        for name in effect.members:
            random = self.world.random.random
            arrival_s = max(self._calls.get(name, 0.0), self.world.now + 0.001 + 0.02 * random())
            self._calls[name] = arrival_s
            takes_s = low_s + (high_s - low_s) * random()
            if self.world.faulty and random() < self.cluster.slowness:
                takes_s += 4 * effect.timeout_s * random()
            if self.world.faulty and random() < self.cluster.stuck:
                continue
            fails = self.world.faulty and effect.op in self.cluster.failing and random() < 0.15
            self.world.after(arrival_s - self.world.now, self._call, effect, name, takes_s, fails)

    def _call(self, effect: Ask, name: str, takes_s: float, fails: bool) -> None:
        """At the member; where its control connection is cut the call comes through when that is healed."""
        member = self.cluster.members.get(name)
        if member is None or not member.alive:
            return
        if name in self.cluster.deaf:
            self.cluster.deaf[name].append((self._call, (effect, name, takes_s, fails)))
            return

        def reply(error: str | None, peer: str | None) -> None:
            self._answer(Answered(effect.number, effect.op, name, error, peer))

        if fails:
            member.run(reply, f"{effect.op} fails here", None)
        else:
            member.run(member.called, effect.op, effect.number, effect.roster, takes_s, reply)

    def _answer(self, event: Answered | Unlinked) -> None:
        if event.member in self.cluster.deaf:
            self.cluster.deaf[event.member].append((self._answer, (event,)))
        else:
            self.later(self.world.delay(0.001, 0.02), event)

    def _watch(self, effect: Watch) -> None:
        before, self.watched = self.watched, set(effect.members)
        for name in effect.members:
            if name not in before:
                self.cluster.look(name, self)
            for number in effect.epochs:
                if name not in before or number not in self._watching:
                    self.world.after(self.world.delay(0.001, 0.02), self._call_lost, name, number)
        self._watching = set(effect.epochs)

    def _call_lost(self, name: str, number: int) -> None:
        member = self.cluster.members.get(name)
        if member is None or not member.alive:
            return
        if name in self.cluster.deaf:
            self.cluster.deaf[name].append((self._call_lost, (name, number)))
            return

        def tell(reason: str, peer: str | None) -> None:
            self._answer(Unlinked(number, name, reason, peer))

        member.run(member.watch, number, tell)

    def lost(self, name: str, reason: str) -> None:
        if name in self.watched:
            self.on(Lost(name, reason))

    def _release(self, effect: Release) -> None:
        for name in effect.members:
            self.world.after(self.world.delay(0.001, 0.3), self.cluster.end, name, self)

    def gone(self, name: str) -> None:
        self.on(Gone(name))

    def _deadline(self, effect: Deadline) -> None:
        self.later(effect.seconds, Late(effect.number, effect.phase))

    def _publish(self, effect: Publish) -> None:
        self.publish()

    def publish(self) -> None:
        self._views += 1
        self.cluster.publish((self.incarnation, self._views), self.coordinator)

    def _done(self, effect: Done) -> None:
        self.cluster.checks.done(effect, self.coordinator)

    def provided(self, number: int, members: tuple[str, ...], error: str | None) -> None:
        self.on(Unprovided(number, error) if error else Provided(number, members))


def brief(value: Event | Effect) -> str:
    """For a trace."""
    if isinstance(value, Ask):
        who = value.roster
        return f"Ask {value.op} {value.number}: {', '.join(value.members)} ({who.shape})"
    if isinstance(value, Answered):
        return f"Answered {value.op} {value.number} by {value.member}{': ' + value.error if value.error else ''}"
    if isinstance(value, Store):
        return "Store"
    if isinstance(value, Adopted):
        return f"Adopted {value.record}"
    return str(value)


__all__ = ["Controller", "Op", "brief"]
