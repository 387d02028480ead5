"""What must always hold, checked where it could be broken: after every decision, switch, token and answer."""

from typing import TYPE_CHECKING

from afd_ray.membership.events import Ask, Done, Record, Roster, Underway
from afd_ray.membership.protocol import Coordinator
from afd_ray.membership.shape import Shape
from afd_ray.simulation.protocol.members import Attention, token_of
from afd_ray.simulation.protocol.world import Violation

if TYPE_CHECKING:
    from afd_ray.simulation.protocol.cluster import Cluster


class Checks:
    """Knows the truth about all processes, which none of them does."""

    def __init__(self, cluster: "Cluster") -> None:
        self.cluster = cluster
        self.streams: dict[int, list[int]] = {}
        """Tokens of each request as its client has them."""
        self.open: set[int] = set()
        """Requests that are not over."""
        self.attempts: dict[int, int] = {}
        self.epochs: dict[int, int] = {}
        """Epoch of each request's last token."""
        self.asks: dict[str, tuple[int, Shape]] = {}
        """Resizes that were asked for and not answered yet: of which incarnation of the controller."""
        self.commits = self.rollbacks = self.recoveries = 0
        self._first_s: dict[int, float] = {}
        self._served_s: dict[int, float] = {}
        """For each epoch when all FFN members had served a row whose token was accepted, for the first time."""
        self._rosters: dict[int, Roster] = {}
        self._drained: dict[int, set[str]] = {}
        self._switched: dict[int, set[str]] = {}
        self._number = 0
        self._committed = 0

    # --- clients --------------------------------------------------------------------------------------------------------------

    def requested(self, request: int) -> None:
        self.streams[request] = []
        self.open.add(request)

    def began(self, request: int, attempt: int) -> None:
        self.attempts[request] = attempt

    def accepted(self, request: int, attempt: int, token: int, epoch: int, first_s: float, last_s: float, member: str) -> None:
        """A client has got its next token, from an epoch whose FFN members served it between these times."""
        stream = self.streams[request]
        if token != token_of(request, len(stream)):
            _violated(f"request {request} got a wrong token at position {len(stream)} from {member}: lost, repeated or changed")
        stream.append(token)
        if attempt != self.attempts[request]:
            _violated(
                f"request {request} got a token of attempt {attempt} from {member}, though it is at {self.attempts[request]}"
            )
        if epoch < self.epochs.get(request, 0):
            _violated(f"request {request} got a token of epoch {epoch} from {member} after one of {self.epochs[request]}")
        self.epochs[request] = epoch
        if self._rosters[epoch].ffn:
            self._check_one_epoch(epoch, first_s, last_s, member)

    def _check_one_epoch(self, epoch: int, first_s: float, last_s: float, member: str) -> None:
        """Of two epochs the earlier one has emitted nothing any more once the later one has."""
        for later, served_s in self._served_s.items():
            if later > epoch and first_s > served_s:
                _violated(
                    f"split brain: {member} emitted in epoch {epoch} at {first_s:.4f}, after epoch {later} did at {served_s:.4f}"
                )
        self._served_s[epoch] = min(last_s, self._served_s.get(epoch, last_s))
        self._first_s[epoch] = max(first_s, self._first_s.get(epoch, first_s))
        for earlier, started_s in self._first_s.items():
            if earlier < epoch and started_s > last_s:
                _violated(
                    f"split brain: epoch {earlier} still emitted at {started_s:.4f}, after {member} did in epoch {epoch} at {last_s:.4f}"
                )

    def ended(self, request: int) -> None:
        self.open.discard(request)

    def failed(self, request: int) -> None:
        """With its ingress: the client was told, and may ask again."""
        self.open.discard(request)

    # --- members --------------------------------------------------------------------------------------------------------------

    def drained(self, member: str, number: int) -> None:
        self._drained.setdefault(number, set()).add(member)

    def switched(self, member: str, number: int, loaded: int) -> None:
        if loaded != number:
            _violated(f"{member} enters epoch {number} with the weights for {loaded}")
        self._switched.setdefault(number, set()).add(member)
        if number > self._committed:
            _violated(f"{member} entered epoch {number}, which was never committed")

    # --- the coordinator ------------------------------------------------------------------------------------------------------

    def decided(self, coordinator: Coordinator) -> None:
        """After each event it was told, before any effect is done."""
        if any(member in coordinator.record.dying for member in coordinator.takers):
            _violated(f"requests are given to released members: {coordinator.takers}")
        change = coordinator.change
        if change is not None and change.kind == "recover" and change.base is not None and not coordinator.cramped:
            living = set(coordinator.record.members).difference(coordinator.record.dying)
            self._check_no_wait(living.intersection(change.base.attention), change.roster.attention)
            self._check_no_wait(living.intersection(change.base.ffn), change.roster.ffn)

    def _check_no_wait(self, living: set[str], new: tuple[str, ...]) -> None:
        """Of one role: while any of those who served are left, a recovery takes no process that has yet to start or to read its weights."""
        members = self.cluster.members
        awaited = [member for member in new if member not in members or not members[member].loaded]
        if awaited and living:
            _violated(
                f"a recovery waits for {', '.join(awaited)} to start or load, though {', '.join(sorted(living))} could serve"
            )

    def stored(self, record: Record) -> None:
        """From here on the next incarnation knows, and what follows is done."""
        roster, change = record.roster, record.change
        if any(member not in record.members for ffn in record.unfenced for member in ffn):
            _violated(f"a recovery would wait for members that have ended: {record.unfenced}, of {record.members}")
        if change is not None:
            self._check_number(change.roster)
        if roster is None or roster.number == self._committed:
            return
        if roster.number < self._committed:
            _violated(f"epoch {roster.number} serves after {self._committed} was committed")
        self._committed = roster.number
        self._check_commit(change, roster)

    def _check_number(self, roster: Roster) -> None:
        known = self._rosters.get(roster.number)
        if known is None:
            if roster.number <= self._number:
                _violated(f"epoch number {roster.number} comes after {self._number}")
            self._number = roster.number
            self._rosters[roster.number] = roster
        elif known != roster:
            _violated(f"epoch number {roster.number} was used twice: {known} and {roster}")

    def _check_commit(self, change: Underway | None, roster: Roster) -> None:
        self.commits += 1
        if change is None or change.base is None:
            return
        if change.kind == "recover":
            self.recoveries += 1
            return
        missing = set(change.base.attention) - self._drained.get(roster.number, set())
        if missing:
            _violated(f"epoch {roster.number} was committed though {', '.join(sorted(missing))} had not drained")

    def asked(self, ask: Ask) -> None:
        """Before the calls go out."""
        if ask.op == "retire":
            switched = self._switched.get(ask.number, set())
            late = [member for member in ask.roster.members if member not in switched]
            if late:
                _violated(f"epoch {ask.number} retires the old one though {', '.join(late)} has not switched")
        if any(member in self.cluster.ended for member in ask.members):
            _violated(f"{ask.op} is asked of a released member: {ask.members}")

    def done(self, done: Done, coordinator: Coordinator) -> None:
        asked = self.asks.pop(done.ask_id, None)
        if asked is None:
            _violated(f"{done} answers what was not asked, or was answered before")
        elif done.outcome == "committed" and coordinator.wanted != asked[1]:
            _violated(f"{done}, but {coordinator.wanted} is wanted")
        if done.outcome != "rolled_back":
            return
        self.rollbacks += 1
        roster = coordinator.roster
        if roster is None or coordinator.broken or coordinator.change is not None:
            return  # nothing served before, or a recovery has begun
        for name in roster.members:
            member = self.cluster.members[name]
            seat = member.seat
            if member.alive and (seat.serving, seat.standby, seat.draining, seat.moving_out) != (roster.number, 0, 0, 0):
                _violated(f"{name} does not just serve epoch {roster.number} after a roll back: {seat}")

    # --- the end --------------------------------------------------------------------------------------------------------------

    def unsettled(self) -> str:
        """Why the cluster is not yet as it should be once nothing disturbs it any more; empty: it is."""
        controller = self.cluster.controller
        coordinator = controller.coordinator
        if not controller.alive or coordinator.state != "ready" or coordinator.record.dying:
            return f"the coordinator is {coordinator.state}, {coordinator.record}"
        if any(incarnation == controller.incarnation for incarnation, _ in self.asks.values()):
            return f"{self.asks} were never answered"
        if self.open:
            return f"requests {sorted(self.open)} are not over"
        roster = coordinator.roster
        assert roster is not None
        alive = sorted(name for name, member in self.cluster.members.items() if member.alive)
        if alive != sorted(roster.members) or coordinator.takers != roster.attention:
            return f"{alive} live, and {roster} serves"
        for name in roster.members:
            member = self.cluster.members[name]
            left = f"{name} holds {member.seat} and edges of epochs {sorted(member.edges)}"
            seat = member.seat
            if (seat.serving, seat.standby, seat.draining, seat.moving_out) != (roster.number, 0, 0, 0) or seat.unlinked:
                return left
            edges = member.edges
            if seat.left or list(edges) != [roster.number] or set(edges[roster.number]) != set(member.peers(roster.number)):
                return left
            if isinstance(member, Attention) and (member.requests or member.in_flight):
                return f"{name} still has requests {sorted(member.requests)}"
        return ""


def _violated(what: str) -> None:
    raise Violation(what)
