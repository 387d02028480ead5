"""A change of epochs, step by step: begun, carried through, rolled back or started over, and what a loss means for it."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from afd_ray.membership import staffing
from afd_ray.membership.blame import victims
from afd_ray.membership.events import (
    Ask,
    Asked,
    Change,
    Deadline,
    Done,
    Effect,
    Kind,
    Phase,
    Provide,
    Release,
    Roster,
)
from afd_ray.membership.pool import Pool
from afd_ray.membership.shape import Shape
from afd_ray.membership.steps import ROLLBACK, STEPS, Deadlines, called


class Changes:
    """What a coordinator knows, and how it gets from one epoch to the next. Effects gather in `_effects`."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self._pool = Pool()
        self._number = 0
        """Highest ever used."""
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
        """FFN members of each earlier epoch of which none is known yet to have left it."""
        self._effects: list[Effect] = []

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
                change.deadline_s = self.deadlines.of(change.phase, change.kind)
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
            self._effects.append(Ask(change.number, phase, members, change.roster, self.deadlines.of(phase, change.kind)))
        return bool(members)

    def _commit(self, change: Change) -> None:
        """From here on members may switch, so that the old epoch cannot be gone back to."""
        change.committed = True
        if self._roster is not None and self._roster != change.roster and self._may_serve(self._roster.ffn):
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
        staffed = (
            staffing.staff(goal, roster, self._living()) if self._cramped else staffing.recovery(roster, goal, self._living())
        )
        self._begin("recover", staffed, None, reason, settle=settle)

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
        olds = [*self._unfenced, *([base] if self._may_serve(base) else [])]
        return any(set(old).isdisjoint(change.roster.ffn) for old in olds)

    def _may_serve(self, ffn: tuple[str, ...]) -> bool:
        """Whether an epoch with these FFN members, which none is known to have left, could still emit: none of them is known to have ended."""
        return bool(ffn) and all(member in self._pool.members for member in ffn)

    def _waited_in_vain(self, roster: Roster) -> None:
        """The epochs that this roster has no part of could not be waited for any longer: they hold up no later recovery either."""
        self._unfenced = [ffn for ffn in self._unfenced if not set(ffn).isdisjoint(roster.ffn)]

    def _has_left(self, member: str) -> None:
        """It serves in no earlier epoch any more, and without it none of those can emit."""
        if self._unfenced:
            self._unfenced = [ffn for ffn in self._unfenced if member not in ffn]

    # --- members --------------------------------------------------------------------------------------------------------------

    def _living(self) -> staffing.Living:
        taken = self._roster.members if self._roster else ()
        base = {member for member in taken if self._pool.lives(member)}
        spares = self._pool.spares("attention", taken), self._pool.spares("ffn", taken)
        return staffing.Living(base, *spares, self._pool.blank)

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
