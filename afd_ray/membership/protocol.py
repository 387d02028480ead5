"""How a cluster gets from one epoch to the next: a state machine without I/O or clock; events in, effects out."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from afd_ray.membership import staffing
from afd_ray.membership.blame import victims
from afd_ray.membership.events import (
    Adopted,
    Answered,
    Ask,
    Asked,
    Change,
    Deadline,
    Done,
    Effect,
    Event,
    Gone,
    Kind,
    Late,
    Lost,
    Phase,
    Provide,
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
)
from afd_ray.membership.pool import Pool
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import NAMES, ROLLBACK, STEPS, Deadlines, called


class Coordinator:
    """Decides every step of forming, resizing and recovering a cluster; its shell does the effects, in the order given.

    Events may come late, twice or never: what is not about the change in progress is ignored. One resize at a time: another one
    asked for meanwhile is refused. While a recovery (or the resize that ends it) is in progress one is kept, and begun after it.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self._pool = Pool()
        self._number = 0
        self._wanted: Shape | None = None
        self._roster: Roster | None = None
        self._change: Change | None = None
        self._broken = ""
        """Why the serving epoch needs a recovery."""
        self._queued: Asked | None = None
        self._failures = 0
        """Attempts in a row to get to the wanted shape."""
        self._cramped = False
        """Whether those who live could not load what a smaller shape asks of them."""
        self._suspicion: dict[str, int] = {}
        """How often each member was at an end of an edge that did not connect."""
        self._unfenced: list[tuple[str, ...]] = []
        self._stopping = False
        self._effects: list[Effect] = []
        self._stored: Record | None = None
        self._shown: tuple[Any, ...] = ()
        self._watched: tuple[int, tuple[str, ...]] = (0, ())
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            Asked: self._on_asked,
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
        self._handlers[type(event)](event)
        effects, self._effects = self._effects, []
        watched = (self._roster.number if self._roster else 0, tuple(self._pool.living()))
        if watched != self._watched:
            self._watched = watched
            effects.append(Watch(*watched))
        shown = (self.state, self._roster, self.takers)
        if shown != self._shown:
            self._shown = shown
            effects.append(Publish())
        record = self.record
        if record != self._stored:
            self._stored = record
            effects.insert(0, Store(record))
        return effects

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
    def wanted(self) -> Shape | None:
        """What was asked for last and committed: what the coordinator gets back to after a loss."""
        return self._wanted

    @property
    def broken(self) -> str:
        """Why the epoch of `roster` cannot go on; empty: it can."""
        return self._broken

    @property
    def takers(self) -> tuple[str, ...]:
        """Attention members that requests may be given to. Whoever is not here any more has lost its requests, or gives them back."""
        if self._roster is None or self._stopping:
            return ()
        return tuple(member for member in self._roster.attention if self._pool.lives(member) and member not in self.leaving)

    @property
    def leaving(self) -> tuple[str, ...]:
        """Attention members that are giving their requests back, each with a `Moved`: nothing of theirs is lost."""
        change = self._change
        if self._roster is None or change is None or change.phase not in ("move_out", "drain"):
            return ()
        return tuple(member for member in change.leavers if member in self._roster.attention)

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
                Done(asked.ask_id, "refused", f"a resize to {change.roster.shape} is in progress ({doing}): try again after it")
            )
        elif self._queued is not None:
            self._effects.append(
                Done(
                    asked.ask_id, "refused", f"a recovery is in progress, and a resize to {self._queued.shape} waits for its end"
                )
            )
        else:
            self._queued = asked
            if change is None:
                self._go_on()

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
        change = self._change
        if change is None or (event.number, event.op) != (change.number, change.phase) or event.member not in change.awaited:
            return
        reason = f"{event.member}: {event.op} failed: {event.error}"
        judged_together = change.kind == "recover" and event.op == "connect"
        if event.error is not None and not judged_together:
            self._failed(change, [event.member], reason)
            return
        if event.error is not None:
            change.blame[event.member] = (event.peer or event.member, reason)
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
        if event.phase in ("settle", "fence"):
            self._advance(change)
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

    # --- a change, step by step -----------------------------------------------------------------------------------------------

    def _go_on(self, *, wait: bool = False) -> None:
        """Nothing is in progress: begin what is to be done next. `wait`: an attempt to get to the wanted shape has just failed."""
        asked, roster = self._queued, self._roster
        assert roster is not None
        if self._broken and not wait:
            self._recover(self._broken)
        elif asked is not None and not self._broken:
            self._queued = None
            if asked.shape == roster.shape and not asked.anew:
                self._wanted = asked.shape
                self._effects.append(Done(asked.ask_id, "committed", "it has this shape already"))
                self._go_on(wait=wait)
            else:
                self._begin("resize", staffing.staff(asked.shape, roster, self._living()), asked.ask_id)
        elif not self._broken and roster.shape == self._wanted:
            self._failures = 0
            self._release_spares()
        elif wait:
            self._failures += 1
            self._effects.append(Deadline(self._number, "backoff", self.deadlines.backoff(self._failures)))
        elif self._wanted is not None:
            self._begin("resize", staffing.staff(self._wanted, roster, self._living()), None)

    def _begin(self, kind: Kind, staff: staffing.Staff, ask_id: str | None, reason: str = "", *, settle: bool = False) -> None:
        """Start on the way to a new epoch in which the ranks nobody has yet are given to new members."""
        self._number += 1
        attention = tuple(member or self._pool.new("attention") for member in staff.attention)
        ffn = tuple(member or self._pool.new("ffn") for member in staff.ffn)
        roster = Roster(self._number, staff.shape, attention, ffn)
        steps: list[Phase] = [step for step in STEPS[kind] if settle or step != "settle"]
        fresh = tuple(member for member in roster.members if member in self._pool.coming)
        change = self._change = Change(kind, self._roster, roster, steps, fresh, ask_id, reason)
        self._advance(change)

    def _advance(self, change: Change) -> None:
        """To the next phase in which there is something to wait for, or the end."""
        while change.steps:
            change.phase = change.steps.pop(0)
            change.awaited, change.blame = set(), {}
            if self._enter(change):
                change.deadline_s = self.deadlines.of(change.phase)
                self._effects.append(Deadline(change.number, change.phase, change.deadline_s))
                return
        if change.rolling_back:
            self._rolled_back(change)
        else:
            self._complete(change)

    def _enter(self, change: Change) -> bool:
        """Do what the phase begins with; gives whether it has anything to wait for."""
        phase = change.phase
        if phase == "settle":
            return True
        if phase == "provide":
            if change.fresh:
                self._effects.append(_provide(change))
            return bool(change.fresh)
        if phase == "fence":
            return self._must_fence(change)
        if phase == "backoff":
            return False
        if phase == "switch":
            self._commit(change)
        members = called(change, phase, self._pool.living())
        if members:
            change.awaited = set(members)
            self._effects.append(Ask(change.number, phase, members, change.roster, self.deadlines.of(phase)))
        return bool(members)

    def _commit(self, change: Change) -> None:
        """From here on members may switch, so that the old epoch cannot be gone back to."""
        change.committed = True
        if self._roster is not None and self._roster.ffn and self._roster != change.roster:
            self._unfenced.append(self._roster.ffn)
        self._roster, self._broken = change.roster, ""
        if change.ask_id is not None:
            self._wanted = change.roster.shape

    def _complete(self, change: Change) -> None:
        self._change, self._cramped = None, False
        self._suspicion.clear()
        if change.kind == "resize":
            self._release_spares()
        if change.ask_id is not None:
            self._effects.append(Done(change.ask_id, "committed"))
        self._go_on()

    def _roll_back(self, change: Change, reason: str) -> None:
        """Give the coming epoch up; what is new is released at once, and the old epoch's members are told."""
        change.rolling_back, change.reason = True, reason
        reached_members = change.phase != "provide" and change.kind != "form"
        change.steps = list(ROLLBACK) if reached_members else []
        self._release_spares()
        self._advance(change)

    def _rolled_back(self, change: Change) -> None:
        self._change = None
        if change.ask_id is not None:
            self._effects.append(Done(change.ask_id, "rolled_back", change.reason))
        if self._roster is not None:
            self._go_on(wait=True)

    def _unprovided(self, change: Change, reason: str) -> None:
        if change.kind == "recover":
            self._abandon(reason)
            self._cramped = False
            self._go_on(wait=True)
        else:
            self._roll_back(change, reason)

    def _recover(self, reason: str, *, settle: bool = False) -> None:
        """Give up what is in progress, and form an epoch from those who live."""
        self._abandon(reason)
        roster, goal = self._roster, self._queued.shape if self._queued else self._wanted
        assert roster is not None
        assert goal is not None
        if self._failures % 2:  # what was wanted could not be had: anything that serves will do
            goal = replace(goal, attention=1, expert_parallel=min(1, goal.expert_parallel))
        plan = staffing.staff if self._cramped else None
        living = self._living()
        staff = plan(goal, roster, living) if plan else staffing.recovery(roster, goal, living)
        self._begin("recover", staff, None, reason, settle=settle)

    def _abandon(self, reason: str) -> None:
        """Drop the change in progress; what was provided for it is kept as spares."""
        change, self._change = self._change, None
        if change is None:
            return
        self._release(change.fresh if not change.provided else ())
        if change.ask_id is not None:
            reason = "; ".join(filter(None, (change.reason, reason)))
            self._effects.append(Done(change.ask_id, "committed" if change.committed else "rolled_back", reason))

    # --- losses ---------------------------------------------------------------------------------------------------------------

    def _failed(self, change: Change, members: list[str], reason: str) -> None:
        """These could not do what the phase asks of them: give the change up while that is possible, else these."""
        if change.kind == "recover" and change.phase == "load" and not (self._cramped or change.fresh):
            self._cramped = True
            self._recover(reason)
        elif change.kind == "recover" or change.committed or change.rolling_back:
            self._lose(members, reason)
        else:
            self._roll_back(change, reason)

    def _await_no_longer(self, change: Change, members: Iterable[str]) -> None:
        """On to the next phase once nobody's answer is missing."""
        awaited = change.awaited.intersection(members)
        change.awaited -= awaited
        if awaited and not change.awaited:
            if change.blame:
                self._judge(change)
            else:
                self._advance(change)

    def _judge(self, change: Change) -> None:
        """Everybody lives and yet edges do not connect: give up members until none of those edges is left."""
        edges = [(member, peer) for member, (peer, _) in change.blame.items()]
        for edge in {frozenset(edge) for edge in edges}:
            for member in edge:
                self._suspicion[member] = self._suspicion.get(member, 0) + 1
        chosen = victims(edges, self._suspicion, change.roster.attention)
        self._lose(chosen, "; ".join(reason for _, reason in change.blame.values()))

    def _lose(self, members: Iterable[str], reason: str) -> None:
        """These have no part in anything any more."""
        lost, change = self._release(members), self._change
        if lost:
            self._consider(set(lost), reason)
        if change is not None and change is self._change:
            self._await_no_longer(change, lost)

    def _consider(self, hit: Collection[str], reason: str, *, settle: bool = False, standby: bool = False) -> None:
        """What it means that these are lost, or that their seats broke: the serving ones, or else (`standby`) those of the coming epoch."""
        change, roster = self._change, self._roster
        serving = not standby and roster is not None and not set(hit).isdisjoint(roster.members)
        coming = change is not None and not set(hit).isdisjoint(change.roster.members)
        if serving and not self._broken:
            self._broken = reason
        if change is not None and change.kind == "recover":
            if coming:
                self._recover(reason, settle=settle)
        elif serving:
            self._recover(reason, settle=settle)
        elif change is not None and coming and not change.rolling_back:
            self._roll_back(change, reason)

    def _must_fence(self, change: Change) -> bool:
        """Whether some earlier epoch could still emit while the coming one does: all of its FFN members may be serving in it."""
        base = change.base.ffn if change.base else ()
        olds = [*self._unfenced, *([base] if base and all(member in self._pool.members for member in base) else [])]
        return any(set(old).isdisjoint(change.roster.ffn) for old in olds)

    def _has_left(self, member: str) -> None:
        """It serves in no earlier epoch any more, and without it none of those can emit."""
        if self._unfenced:
            self._unfenced = [ffn for ffn in self._unfenced if member not in ffn]

    # --- members --------------------------------------------------------------------------------------------------------------

    def _living(self) -> staffing.Living:
        taken = self._roster.members if self._roster else ()
        base = {member for member in taken if self._pool.lives(member)}
        return staffing.Living(base, self._pool.spares("attention", taken), self._pool.spares("ffn", taken))

    def _release_spares(self) -> None:
        taken = self._roster.members if self._roster else ()
        self._release([member for member in self._pool.members if member not in taken])

    def _release(self, members: Iterable[str]) -> tuple[str, ...]:
        released = self._pool.release(members)
        if released:
            self._effects.append(Release(released))
        return released


def _provide(change: Change) -> Provide:
    fresh = set(change.fresh)
    attention = tuple(member for member in change.roster.attention if member in fresh)
    groups = (tuple(member for member in instance if member in fresh) for instance in change.roster.instances)
    return Provide(change.number, attention, tuple(group for group in groups if group))
