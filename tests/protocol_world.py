"""A coordinator with a world that does what it wants at once, for tests."""

from collections.abc import Iterable

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
    Phase,
    Provide,
    Provided,
    Publish,
    Record,
    Release,
    Store,
    Unprovided,
    Watch,
)
from afd_ray.membership.protocol import Coordinator
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import Deadlines


class World:
    """Does at once what the coordinator wants, but for what a test holds back, and writes it all down."""

    def __init__(self, record: Record | None = None) -> None:
        self.coordinator = Coordinator(Deadlines())
        self.log: list[str] = []
        self.done: list[Done] = []
        self.stored = Record()
        self.held: set[tuple[str, str]] = set()
        """(call, member) that is not answered; member * for all."""
        self.errors: dict[tuple[str, str], tuple[str, str | None]] = {}
        """Error and peer for (call, member)."""
        self.room = True
        self.backoffs: list[float] = []
        self.keeps_released = False
        if record is not None:
            self.tell(Adopted(record))

    def tell(self, *events: Event) -> None:
        todo = list(events)
        while todo:
            effects = self.coordinator.on(todo.pop(0))
            assert all(not isinstance(effect, Store) for effect in effects[1:]), "the record comes first"
            for effect in effects:
                todo += self._does(effect)

    def _does(self, effect: Effect) -> Iterable[Event]:
        line = _line(effect)
        if line:
            self.log.append(line)
        if isinstance(effect, Store):
            self.stored = effect.record
        elif isinstance(effect, Provide) and ("provide", "*") not in self.held:
            members = effect.attention + sum(effect.ffn, ())
            return [Provided(effect.number, members) if self.room else Unprovided(effect.number, "no room")]
        elif isinstance(effect, Ask):
            return [self._answer(effect, member) for member in effect.members if not self._is_held(effect.op, member)]
        elif isinstance(effect, Release) and not self.keeps_released:
            return [Gone(member) for member in effect.members]
        elif isinstance(effect, Deadline) and effect.phase == "settle":
            return [Late(effect.number, "settle")]
        elif isinstance(effect, Deadline) and effect.phase == "backoff":
            self.backoffs.append(effect.seconds)
        elif isinstance(effect, Done):
            self.done.append(effect)
        return []

    def _is_held(self, op: str, member: str) -> bool:
        return (op, member) in self.held or (op, "*") in self.held

    def _answer(self, ask: Ask, member: str) -> Answered:
        error, peer = self.errors.get((ask.op, member), (None, None))
        return Answered(ask.number, ask.op, member, error, peer)

    def late(self, phase: Phase) -> None:
        change = self.coordinator.change
        self.tell(Late(change.number if change else self.number, phase))

    @property
    def number(self) -> int:
        return self.coordinator.record.number

    @property
    def members(self) -> tuple[str, ...]:
        roster = self.coordinator.roster
        assert roster is not None
        return roster.members

    def serves(self, *members: str, shape: Shape | None = None) -> None:
        """Nothing is in progress, and these serve, in the order of the ranks."""
        assert self.coordinator.change is None
        assert not self.coordinator.broken
        assert self.members == members
        assert set(self.coordinator.record.members) == set(members), "nobody else is left"
        if shape is not None:
            assert self.coordinator.roster is not None
            assert self.coordinator.roster.shape == shape


def _line(effect: Effect) -> str:
    if isinstance(effect, Ask):
        return f"{effect.op} {effect.number}: {' '.join(effect.members)}"
    if isinstance(effect, Provide):
        return f"provide {effect.number}: {' '.join(effect.attention)} | {' | '.join(' '.join(group) for group in effect.ffn)}"
    if isinstance(effect, Release):
        return f"release {' '.join(effect.members)}"
    if isinstance(effect, Done):
        return f"{effect.ask_id} {effect.outcome}{': ' + effect.reason if effect.reason else ''}"
    assert isinstance(effect, Store | Deadline | Watch | Publish)
    return ""


def shape(attention: int, tensor_parallel: int, expert_parallel: int) -> Shape:
    return Shape(attention, tensor_parallel, expert_parallel, None)


def cluster(attention: int, tensor_parallel: int, expert_parallel: int) -> World:
    world = World()
    world.tell(Asked("start", shape(attention, tensor_parallel, expert_parallel)))
    assert world.done == [Done("start", "committed")]
    assert world.coordinator.state == "ready"
    world.log, world.done = [], []
    return world
