"""The phases of each kind of change, in order, and who is called in each."""

from dataclasses import dataclass

from afd_ray.membership.events import Change, Kind, Phase

STEPS: dict[Kind, tuple[Phase, ...]] = {
    "form": ("provide", "load", "prepare", "connect", "switch"),
    "resize": ("provide", "load", "prepare", "connect", "move_out", "drain", "switch", "retire"),
    "recover": ("settle", "provide", "load", "prepare", "connect", "fence", "switch", "retire"),
}
"""`switch` is the point from which there is no way back."""

ROLLBACK: tuple[Phase, ...] = ("resume", "discard")

NAMES: dict[Phase, str] = {
    "settle": "waiting for what broke a link",
    "provide": "starting new actors",
    "load": "loading weights",
    "prepare": "preparing the new epoch",
    "connect": "connecting the new epoch",
    "move_out": "moving requests off the actors that leave",
    "drain": "stopping at a step boundary",
    "fence": "waiting for lost actors to end",
    "switch": "switching to the new epoch",
    "retire": "leaving the old epoch",
    "resume": "resuming in the old epoch",
    "discard": "discarding the new epoch",
    "backoff": "waiting to try again",
}
"""For people."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each phase may take, seconds. What a member is given with a call should end sooner, so that it can say what is wrong."""

    settle_s: float = 0.05
    """From a broken link to the recovery: the death that explains it may be heard a moment later."""
    provide_s: float = 60.0
    load_s: float = 3600.0
    prepare_s: float = 10.0
    connect_s: float = 30.0
    reconnect_s: float = 4.0
    """Instead of `connect_s` in a recovery: everybody waits meanwhile, and is known to live."""
    move_out_s: float = 10.0
    drain_s: float = 5.0
    switch_s: float = 5.0
    retire_s: float = 10.0
    resume_s: float = 5.0
    discard_s: float = 10.0
    fence_s: float = 5.0
    """For a lost FFN member to be known to have ended, where no other shows that the old epoch is over."""
    backoff_s: float = 1.0
    """Until the wanted shape is tried again; doubles each time, up to `most_backoff_s`."""
    most_backoff_s: float = 30.0

    def of(self, phase: Phase, kind: Kind) -> float:
        if (phase, kind) == ("connect", "recover"):
            return self.reconnect_s
        return float(getattr(self, f"{phase}_s"))

    def backoff(self, attempts: int) -> float:
        """After so many failures in a row."""
        return float(min(self.most_backoff_s, self.backoff_s * 2 ** min(attempts - 1, 16)))


def called(change: Change, phase: Phase, living: list[str]) -> tuple[str, ...]:
    """Who is asked to do what the phase says; `living`: everybody who is up, spares too."""
    roster, base = change.roster, change.base
    if phase in ("load", "prepare", "connect", "switch"):
        return roster.members
    if phase == "move_out":
        return tuple(member for member in change.leavers if base is not None and member in base.attention)
    if phase in ("drain", "resume"):
        return tuple(member for member in (base.attention if base else ()) if member in living)
    if phase == "discard":
        return tuple(member for member in (base.members if base else ()) if member in living)
    if phase == "retire":
        return tuple(living) if change.kind == "recover" else roster.members
    return ()
