"""A member's side of an epoch change: where it serves, what stands by, and which calls come too late."""

from dataclasses import dataclass, field


class Stale(ValueError):
    """The call is about an epoch that is over, or that this member has no seat in."""


@dataclass(slots=True)
class Seat:
    """Which epoch a member serves in, and what the controller has asked of it for the coming one. No I/O, no clock.

    Every call names the epoch it is about. An epoch is over for a member once it was given up (`resume`, `discard`) or a later one was entered;
    a call about it raises Stale, however late it comes: also from a controller that has died since.
    A shell in which calls overlap asks again when a slow one ends (`load` once more, `standby`): what was loaded or opened for an epoch
    that is not the coming one by then must not replace what was for a later one.
    """

    member: str
    serving: int = 0
    """The epoch of the seat that the step loop runs in; 0: none."""
    standby: int = 0
    """The epoch of the seat beside it; 0: none."""
    over: int = 0
    """No call about this epoch or an earlier one opens anything any more."""
    coming: int = 0
    """The newest epoch that it was to get ready for: what is still said of an earlier one comes too late."""
    draining: int = 0
    """The coming epoch that it starts no micro-batch for the sake of; 0: it runs."""
    moving_out: int = 0
    """The coming epoch that it gives its requests back for the sake of; 0: it takes requests."""
    unlinked: bool = False
    """The serving seat has failed: it runs nothing until it enters a later epoch."""
    standby_failed: bool = False
    """The standby seat has: entering it leaves the member unlinked, so that a recovery follows."""
    left: set[int] = field(default_factory=set)
    """Epochs it has left whose seats are open still, for peers that have not."""

    @property
    def may_run(self) -> bool:
        """Whether a micro-batch may start."""
        return self.serving > 0 and not self.draining and not self.unlinked

    def load(self, number: int) -> None:
        """Weights for this epoch are wanted: asked before they are read, and again before they are kept."""
        self._check_coming(number, "load")

    def prepare(self, number: int) -> int:
        """A seat in this epoch may be opened; gives the standby seat to close first (0: none), a later epoch replaces it."""
        self._check_coming(number, "prepare")
        superseded, self.standby = self.standby, number
        self.standby_failed = False
        return superseded

    def connect(self, number: int) -> None:
        self._check_standby(number, "connect")

    def move_out(self, number: int) -> None:
        """Give every request back, and every new one, until `resume`, `overdue` or `switch`."""
        self._check_coming(number, "move_out")
        self.moving_out = number

    def drain(self, number: int) -> None:
        """Start no micro-batch until `resume`, `overdue` or `switch`."""
        self._check_coming(number, "drain")
        self.draining = number

    def held(self, number: int) -> bool:
        """Whether it stands at the boundary for the sake of this epoch with requests of its own, which wait as long as nothing comes.

        One that moves out has none: were it to go on, it could emit in an epoch that others have left.
        """
        return self.draining == number and not self.moving_out

    def resume(self, number: int) -> None:
        """Go on where it serves: the coming epoch is given up. Harmless when repeated."""
        if number <= self.serving:
            raise Stale(f"{self.member}: resume of epoch {number} comes too late, it serves {self.serving}")
        self.over = max(self.over, number)
        self._go_on(number)

    def overdue(self, number: int) -> None:
        """Nothing came for longer than `drain` or `move_out` allowed: go on where it serves; `switch` may still come."""
        self._go_on(number)

    def discard(self, number: int) -> int:
        """The coming epoch is given up; gives the standby seat to close (0: none). Harmless when repeated, or after a later one was entered."""
        self.over = max(self.over, number)
        if not 0 < self.standby <= number:
            return 0
        closed, self.standby = self.standby, 0
        return closed

    def switch(self, number: int) -> bool:
        """Enter the standby seat; False: it serves there already."""
        if number == self.serving:
            return False
        self._check_standby(number, "switch")
        if self.serving:
            self.left.add(self.serving)
        self.serving, self.standby, self.over = number, 0, max(self.over, number)
        self.draining = self.moving_out = 0
        self.unlinked, self.standby_failed = self.standby_failed, False
        return True

    def retire(self, number: int) -> set[int]:
        """Gives the seats to close: all of epochs before this one, which everybody has entered who belongs to it.

        A member that this epoch has no place for is then without a seat, and may be given one again.
        """
        if number < self.serving:
            raise Stale(f"{self.member}: retire for epoch {number} comes too late, it serves {self.serving}")
        closed, self.left = self.left, set()
        if self.serving < number:
            closed |= {self.serving} - {0}
            self.serving, self.unlinked = 0, False
            self.draining = self.moving_out = 0
        if 0 < self.standby < number:
            closed.add(self.standby)
            self.standby = 0
        self.over = max(self.over, number - 1)
        return closed

    def broke(self, number: int) -> bool:
        """The seat of this epoch failed; True when the controller should know: this member has (or would have) no part in the epoch."""
        if number == self.serving and not self.unlinked:
            self.unlinked = True
            return True
        if number == self.standby and not self.standby_failed:
            self.standby_failed = True
            return True
        return False

    def failed(self, number: int) -> bool:
        """Whether the seat of this epoch is held and has failed."""
        return (number == self.serving and self.unlinked) or (number == self.standby and self.standby_failed)

    def _go_on(self, number: int) -> None:
        if self.draining <= number:
            self.draining = 0
        if self.moving_out <= number:
            self.moving_out = 0

    def _check_coming(self, number: int, call: str) -> None:
        known = max(self.over, self.serving)
        if number <= known:
            raise Stale(f"{self.member}: {call} for epoch {number} comes too late, {known} is over or served")
        if number < self.coming:
            raise Stale(f"{self.member}: {call} for epoch {number} comes too late, it gets ready for {self.coming}")
        self.coming = number

    def _check_standby(self, number: int, call: str) -> None:
        if number != self.standby:
            raise Stale(f"{self.member}: {call} for epoch {number} without a seat in it, standby is {self.standby or 'none'}")
        if number < self.coming:
            raise Stale(f"{self.member}: {call} for epoch {number} comes too late, it gets ready for {self.coming}")
