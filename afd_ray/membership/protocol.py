"""How a cluster gets from one epoch to the next: a state machine without I/O or clock; events in, effects out."""

from dataclasses import dataclass

from afd_ray.membership.events import Change, Effect, Event, Roster, State
from afd_ray.membership.shape import Shape


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each phase may take, seconds."""

    settle_s: float = 0.05
    """From a broken link to the recovery: the death that explains it may be heard a moment later."""
    provide_s: float = 60.0
    load_s: float = 3600.0
    prepare_s: float = 10.0
    connect_s: float = 30.0
    move_out_s: float = 10.0
    drain_s: float = 5.0
    switch_s: float = 5.0
    retire_s: float = 10.0
    rollback_s: float = 5.0
    fence_s: float = 5.0
    """For a lost FFN member to be known to have ended, where none of the old epoch's takes part in the new one."""
    backoff_s: float = 1.0
    """Until the wanted shape is tried again; doubles up to `most_backoff_s`."""
    most_backoff_s: float = 30.0


class Coordinator:
    """Decides every step of forming, resizing and recovering a cluster; its shell does the effects, in the order given.

    Events may come late, twice or never: what is not about the change in progress is ignored.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        self.deadlines = deadlines

    def on(self, event: Event) -> list[Effect]:
        """What is to be done now that this has happened."""
        raise NotImplementedError

    @property
    def state(self) -> State:
        raise NotImplementedError

    @property
    def roster(self) -> Roster | None:
        """Serving; None before the first epoch has formed."""
        raise NotImplementedError

    @property
    def change(self) -> Change | None:
        """In progress."""
        raise NotImplementedError

    @property
    def wanted(self) -> Shape | None:
        """What was asked for last and committed: what a recovery gets back to."""
        raise NotImplementedError

    @property
    def takers(self) -> tuple[str, ...]:
        """The attention members that new requests may be given to; whoever is not here any more has lost its requests, or gives them back."""
        raise NotImplementedError
