"""How a cluster gets from one epoch to the next: a state machine without I/O or clock; events in, effects out."""

from collections.abc import Callable, Iterator
from typing import Any

from afd_ray.membership import staffing
from afd_ray.membership.changes import Changes
from afd_ray.membership.events import (
    Adopted,
    Answered,
    Asked,
    Change,
    Done,
    Effect,
    Event,
    Gone,
    Late,
    Lost,
    Provided,
    Publish,
    Record,
    Release,
    Roster,
    State,
    Stopping,
    Store,
    Underway,
    Unlinked,
    Unprovided,
    Watch,
    Withdrawn,
)
from afd_ray.membership.pool import Pool
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import NAMES, STEPS, Deadlines

INSTEAD = "try again after it, or call it off (afd-ray scale --cancel)"
"""Of another resize."""


class Coordinator(Changes):
    """Decides every step of forming, resizing and recovering a cluster; its shell does the effects, in the order given.

    Events may come late, twice or never: what is not about the change in progress is ignored. One resize at a time: another one
    asked for meanwhile is refused. While a recovery (or the resize that ends it) is in progress one is kept, and begun after it.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        super().__init__(deadlines)
        self._stopping = False
        self._stored: Record | None = None
        self._shown: tuple[Any, ...] = ()
        self._watched: tuple[tuple[int, ...], tuple[str, ...]] = ((), ())
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Asked: self._on_asked,
            Withdrawn: self._on_withdrawn,
            Provided: self._on_provided,
            Unprovided: self._on_unprovided,
            Answered: self._on_answered,
            Lost: self._on_lost,
            Unlinked: self._on_unlinked,
            Gone: self._on_gone,
            Late: self._on_late,
            Adopted: self._on_adopted,
            Stopping: self._on_stopping,
        }

    # --- what the shell and others may look at --------------------------------------------------------------------------------

    def on(self, event: Event) -> list[Effect]:
        """What is to be done now that this has happened, in this order."""
        if not self._stopping or isinstance(event, Asked | Provided | Gone):
            self._handlers[type(event)](event)
        effects, self._effects = self._effects, []
        return [*self._news(), *effects]

    def _news(self) -> Iterator[Effect]:
        """What follows from the new state alone. It goes first: nothing is done before the record is kept, and nobody is given
        requests any more who is about to be asked to give his back."""
        record = self.record
        if record != self._stored:
            self._stored = record
            yield Store(record)
        watched = (self._open_epochs, tuple(self._pool.living()))
        if watched != self._watched:
            self._watched = watched
            yield Watch(*watched)
        shown = (self.state, self._roster, self.takers, self.leaving)
        if shown != self._shown:
            self._shown = shown
            yield Publish()

    @property
    def state(self) -> State:
        """`degraded`: not what is wanted, and nothing can be done about it for the moment."""
        if self._stopping:
            return "stopping"
        if self._roster is None:
            return "starting"
        if self._change is not None:
            return "resizing" if self._change.kind == "resize" and self._change.ask_id is not None else "recovering"
        return "ready" if not self._broken and self._roster.shape == self._wanted else "degraded"

    @property
    def roster(self) -> Roster | None:
        """What serves, or did until it broke; None before the first epoch has formed."""
        return self._roster

    @property
    def change(self) -> Change | None:
        """In progress."""
        return self._change

    @property
    def asked(self) -> str | None:
        """The `ask_id` of the resize that somebody asked for and that is not over: in progress, or kept until a recovery is."""
        if self._change is not None and self._change.kind == "resize" and self._change.ask_id is not None:
            return self._change.ask_id
        return self._queued.ask_id if self._queued else None

    @property
    def wanted(self) -> Shape | None:
        """What was asked for last and committed: what the coordinator gets back to after a loss."""
        return self._wanted

    @property
    def broken(self) -> str:
        """Why the epoch of `roster` cannot go on; empty: it can."""
        return self._broken

    @property
    def cramped(self) -> bool:
        """Whether those who live cannot hold all that is served, so that a recovery waits for others."""
        return self._cramped

    @property
    def takers(self) -> tuple[str, ...]:
        """Attention members that requests may be given to. Whoever is not here any more has lost its requests, or gives them back."""
        if self._roster is None or self._stopping:
            return ()
        leaving = self.leaving
        return tuple(member for member in self._roster.attention if self._pool.lives(member) and member not in leaving)

    @property
    def leaving(self) -> tuple[str, ...]:
        """Attention members that are giving their requests back, each with a `Moved`: nothing of theirs is lost."""
        change = self._change
        if self._roster is None or change is None or change.phase not in ("move_out", "drain"):
            return ()
        return tuple(member for member in change.leavers if member in self._roster.attention)

    @property
    def _open_epochs(self) -> tuple[int, ...]:
        """Those whose links matter: what breaks in the coming one before its commit can still be rolled back."""
        change = self._change
        coming = change is not None and change.phase in ("move_out", "drain", "fence")
        return tuple(roster.number for roster in (self._roster, change.roster if change and coming else None) if roster)

    @property
    def record(self) -> Record:
        change = self._change
        underway = None if change is None else Underway(change.kind, change.base, change.roster, change.committed)
        return Record(
            self._number,
            self._pool.started,
            self._wanted,
            self._roster,
            bool(self._broken),
            underway,
            tuple(self._pool.members),
            tuple(sorted(self._pool.dying)),
            tuple(self._unfenced),
        )

    # --- events ---------------------------------------------------------------------------------------------------------------

    def _on_asked(self, asked: Asked) -> None:
        change = self._change
        if self._stopping:
            self._effects.append(Done(asked.ask_id, "refused", "the cluster is stopping"))
        elif self._roster is None and change is None:
            self._begin("form", staffing.staff(asked.shape, None, staffing.Living(())), asked.ask_id)
        elif change is not None and (change.ask_id is not None or change.kind == "form"):
            doing = f"{NAMES[change.phase]}, epoch {change.number}"
            self._effects.append(
                Done(asked.ask_id, "refused", f"a resize to {change.roster.shape} is in progress ({doing}): {INSTEAD}")
            )
        elif self._queued is not None:
            self._effects.append(
                Done(
                    asked.ask_id,
                    "refused",
                    f"a recovery is in progress, and a resize to {self._queued.shape} waits for its end: {INSTEAD}",
                )
            )
        else:
            self._queued = asked
            if change is None:
                self._go_on()

    def _on_withdrawn(self, event: Withdrawn) -> None:
        change = self._change
        if self._queued is not None and self._queued.ask_id == event.ask_id:
            self._queued = None
            self._effects.append(Done(event.ask_id, "refused", event.reason))
        elif change is not None and change.ask_id == event.ask_id and not (change.committed or change.rolling_back):
            self._roll_back(change, event.reason)

    def _on_provided(self, event: Provided) -> None:
        change = self._change
        if change is None or (event.number, "provide") != (change.number, change.phase):
            again = tuple(member for member in event.members if not self._pool.lives(member))
            if again:
                self._effects.append(Release(again))
            return
        change.provided = True
        self._pool.coming.difference_update(change.fresh)
        self._advance(change)

    def _on_unprovided(self, event: Unprovided) -> None:
        change = self._change
        if change is not None and (event.number, "provide") == (change.number, change.phase):
            self._unprovided(change, event.reason)

    def _on_answered(self, event: Answered) -> None:
        if event.op == "switch" and event.error is None:
            self._has_left(event.member)
        if event.op == "load" and event.error is None:
            self._pool.loaded(event.member)
        change = self._change
        if change is None or (event.number, event.op) != (change.number, change.phase) or event.member not in change.awaited:
            return
        reason = f"{event.member}: {event.op} failed: {event.error}"
        judged_together = change.kind == "recover" and event.op == "connect"
        if event.error is not None and not judged_together:
            self._failed(change, [event.member], reason)
            return
        if event.error is not None:
            peer = event.peer if event.peer in change.roster.members else None
            change.blame[event.member] = (peer or event.member, reason)
        self._await_no_longer(change, [event.member])

    def _on_lost(self, event: Lost) -> None:
        self._lose([event.member], f"{event.member} is lost: {event.reason}")

    def _on_unlinked(self, event: Unlinked) -> None:
        if not self._pool.lives(event.member):
            return
        change, reason = self._change, f"{event.member}: {event.reason}"
        if self._roster is not None and event.number == self._roster.number:
            if not self._broken and event.member in self._roster.members:
                self._consider({event.member}, reason, settle=True)
        elif change is not None and event.number == change.number and not change.rolling_back:
            self._consider({event.member}, reason, settle=True, standby=True)

    def _on_gone(self, event: Gone) -> None:
        self._pool.gone(event.member)
        self._has_left(event.member)
        change = self._change
        if change is not None and change.phase == "fence" and not self._must_fence(change):
            self._advance(change)

    def _on_late(self, event: Late) -> None:
        change = self._change
        if change is None:
            if event == Late(self._number, "backoff"):
                self._go_on()
            return
        if (event.number, event.phase) != (change.number, change.phase):
            return
        if event.phase == "settle":
            self._advance(change)
        elif event.phase == "fence":
            self._advance(change)
            self._waited_in_vain(change.roster)
        elif event.phase == "provide":
            self._unprovided(change, f"no room for it in {change.deadline_s:g} s")
        else:
            names = ", ".join(sorted(change.awaited))
            self._failed(change, sorted(change.awaited), f"{names}: {event.phase} not over in {change.deadline_s:g} s")

    def _on_adopted(self, event: Adopted) -> None:
        """Go on from what the last controller left: forwards from a commit, back from anything before it."""
        record = self._stored = event.record
        self._number, self._wanted, self._roster = record.number, record.wanted, record.roster
        self._broken = "the controller was restarted in a recovery" if record.broken else ""
        self._unfenced = list(record.unfenced)
        self._pool = Pool(record.started, list(record.members), set(record.dying))
        was = record.change
        taken = set(self._roster.members if self._roster else ())
        if record.dying:
            self._effects.append(Release(record.dying))
        self._release(member for member in self._pool.living() if member not in taken)
        if was is None or (was.kind != "resize" and not was.committed):
            if self._roster is not None:
                self._go_on()
            return
        change = self._change = Change(was.kind, was.base, was.roster, [], provided=True, committed=was.committed)
        if was.committed:
            change.steps = list(STEPS[was.kind][STEPS[was.kind].index("switch") :])
            self._advance(change)
        else:
            change.phase = "connect"
            self._roll_back(change, "the controller was restarted")

    def _on_stopping(self, event: Stopping) -> None:
        self._stopping = True
        self._abandon("the cluster is stopping")
        if self._queued is not None:
            self._effects.append(Done(self._queued.ask_id, "refused", "the cluster is stopping"))
        self._queued = None
        self._release(list(self._pool.members))
