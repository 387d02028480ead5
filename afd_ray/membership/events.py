"""The values of an epoch change: what the controller is told, what it is to do, and what it must not forget."""

from dataclasses import dataclass, field
from typing import Literal

from afd_ray.membership.shape import Shape

Kind = Literal["form", "resize", "recover"]
Op = Literal["load", "prepare", "connect", "move_out", "drain", "resume", "switch", "retire", "discard"]
Phase = Literal["settle", "provide", "fence", "backoff"] | Op
State = Literal["starting", "ready", "resizing", "recovering", "degraded", "stopping"]
Outcome = Literal["committed", "rolled_back", "refused"]


@dataclass(frozen=True, slots=True)
class Roster:
    """Who has which rank in one epoch."""

    number: int
    shape: Shape
    attention: tuple[str, ...]
    """Member ids by rank."""
    ffn: tuple[str, ...]
    """Member ids by FFN rank, instance by instance."""

    @property
    def members(self) -> tuple[str, ...]:
        """In the order of the group ranks."""
        return self.attention + self.ffn

    @property
    def instances(self) -> tuple[tuple[str, ...], ...]:
        """The FFN members of each instance by tensor-parallel rank."""
        ranks = self.shape.tensor_parallel
        return tuple(self.ffn[i : i + ranks] for i in range(0, len(self.ffn), ranks))


@dataclass(slots=True)
class Change:
    """The way from one epoch to the next, in progress."""

    kind: Kind
    base: Roster | None
    """What serves, or did until it broke; None: nothing has served yet."""
    roster: Roster
    """What is to serve; its number names the change."""
    steps: list[Phase]
    """Phases that are still to come."""
    fresh: tuple[str, ...] = ()
    """Members of the roster that are to be provided."""
    ask_id: str | None = None
    """Who asked for it; None: the coordinator itself, to get to the wanted shape."""
    reason: str = ""
    """Why it is being rolled back, or why a recovery was needed."""
    phase: Phase = "provide"
    awaited: set[str] = field(default_factory=set)
    """Members that have not answered this phase's calls yet."""
    deadline_s: float = 0.0
    """Of the phase, from its beginning."""
    provided: bool = False
    """Whether the fresh members are there."""
    committed: bool = False
    """Whether there is no way back: members may have switched."""
    rolling_back: bool = False
    blame: dict[str, tuple[str, str]] = field(default_factory=dict)
    """In a recovery's `connect`: by the member that gave an error, the other end of the edge (or itself) and the error."""

    @property
    def number(self) -> int:
        return self.roster.number

    @property
    def leavers(self) -> tuple[str, ...]:
        """Members of the base that have no rank in the coming epoch."""
        staying = set(self.roster.members)
        return tuple(member for member in (self.base.members if self.base else ()) if member not in staying)


@dataclass(frozen=True, slots=True)
class Underway:
    """What a record says of a change."""

    kind: Kind
    base: Roster | None
    roster: Roster
    committed: bool
    """True: members may have switched, so that it has to go on. False: it is to be rolled back."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a restarted controller needs to know: kept where the controller's death does not reach."""

    number: int = 0
    """Highest epoch number ever used."""
    started: int = 0
    """How many member ids were ever given out."""
    wanted: Shape | None = None
    roster: Roster | None = None
    """What serves; from the commit on that is what members are switching to."""
    broken: bool = False
    """Whether that epoch has lost a member or a link, and needs a recovery."""
    change: Underway | None = None
    members: tuple[str, ...] = ()
    """Every id given out that is not known to be gone."""
    dying: tuple[str, ...] = ()
    """Of them, those that were released."""
    unfenced: tuple[tuple[str, ...], ...] = ()
    """FFN members of each earlier epoch of which none is known yet to have left it."""


# --- what the coordinator is told ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody wants this shape. `anew`: form a new epoch even if it has this shape already (experts placed by load)."""

    ask_id: str
    shape: Shape
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Whoever asked waits no longer: rolled back as long as that is possible. Nothing else is disturbed."""

    ask_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Provided:
    """The fresh members of this change are up (their processes answer); `members` all of them."""

    number: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unprovided:
    """They cannot be had. What did come up is released by the `Release` that follows."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A member has answered a call of `Ask`; `peer`: the member at the other end, where the error is about an edge."""

    number: int
    op: Op
    member: str
    error: str | None = None
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """A member is dead, or was silent for longer than the heartbeat allows."""

    member: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unlinked:
    """A member lives, but its seat in epoch `number` has failed; `peer`: the member whose link broke, where known."""

    number: int
    member: str
    reason: str
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class Gone:
    """A member that was released is known to have ended (or never began), and nothing of it is left."""

    member: str


@dataclass(frozen=True, slots=True)
class Late:
    """The deadline set for this phase of this change has passed. Told for phases that are over too: those are ignored."""

    number: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Adopted:
    """First event of a restarted controller: what the last one left."""

    record: Record


@dataclass(frozen=True, slots=True)
class Stopping:
    """The cluster is to end."""


Event = Asked | Withdrawn | Provided | Unprovided | Answered | Lost | Unlinked | Gone | Late | Adopted | Stopping


# --- what is to be done, in this order ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Store:
    """Keep the record where it outlives the controller, before anything that follows is done."""

    record: Record


@dataclass(frozen=True, slots=True)
class Provide:
    """Start these members (placement groups, processes under these names): answers Provided or Unprovided.

    A `Release` of any of them ends the whole attempt, also when it is still under way: none may come up afterwards.
    """

    number: int
    attention: tuple[str, ...]
    ffn: tuple[tuple[str, ...], ...]
    """Grouped by the instance they will be in: one placement group each."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Call `op` on each of these members, at once; each answer is an `Answered`.

    `roster` is that of epoch `number`: ranks for `prepare`, shards for `load`. `timeout_s`: when the coordinator stops waiting.
    """

    number: int
    op: Op
    members: tuple[str, ...]
    roster: Roster
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Watch:
    """Watch exactly these from now on: a heartbeat and the death of each (`Lost`), and `lost(n)`, for each of these epochs, of those that have a
    seat in it (`Unlinked`)."""

    epochs: tuple[int, ...]
    """The one that serves, and the coming one while it stands by with all its edges."""
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """End these for good, however they are (a stopped process too), and free what they hold: a `Gone` each. Harmless when repeated."""

    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deadline:
    """Tell `Late(number, phase)` after this long."""

    number: int
    phase: Phase
    seconds: float


@dataclass(frozen=True, slots=True)
class Publish:
    """What ingress and status show has changed: `state`, `roster`, `takers`."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to an `Asked`."""

    ask_id: str
    outcome: Outcome
    reason: str = ""


Effect = Store | Provide | Ask | Watch | Release | Deadline | Publish | Done
