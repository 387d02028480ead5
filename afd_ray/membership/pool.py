"""Every member id that was given out, until nothing of it is left."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["attention", "ffn"]


@dataclass(slots=True)
class Pool:
    """Ids in the order in which they were given out. An id is never given out twice."""

    started: int = 0
    members: list[str] = field(default_factory=list)
    """Those that are not known to be gone."""
    dying: set[str] = field(default_factory=set)
    """Of them, those that were released: they have no work any more, and are not known to have ended."""
    coming: set[str] = field(default_factory=set)
    """Of them, those that are being provided."""
    blank: set[str] = field(default_factory=set)
    """Of them, those that have not loaded anything yet."""

    def new(self, role: Role) -> str:
        member = f"{role}-{self.started}"
        self.started += 1
        self.members.append(member)
        self.coming.add(member)
        self.blank.add(member)
        return member

    def lives(self, member: str) -> bool:
        """Whether it can be given work, now or once it is provided."""
        return member in self.members and member not in self.dying

    def living(self) -> list[str]:
        """Those that are up and can be given work."""
        return [member for member in self.members if member not in self.dying and member not in self.coming]

    def spares(self, role: Role, taken: Collection[str]) -> list[str]:
        return [member for member in self.living() if member not in taken and member.startswith(role)]

    def loaded(self, member: str) -> None:
        """It holds weights."""
        self.blank.discard(member)

    def release(self, members: Iterable[str]) -> tuple[str, ...]:
        """Give these up; gives those that were not given up before."""
        released = tuple(member for member in members if self.lives(member))
        self.dying.update(released)
        self.coming.difference_update(released)
        self.blank.difference_update(released)
        return released

    def gone(self, member: str) -> None:
        """Only what was released is known to be gone for good."""
        if member in self.dying:
            self.dying.discard(member)
            self.members.remove(member)
