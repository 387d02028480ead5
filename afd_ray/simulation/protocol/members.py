"""The actors of a simulated cluster: seats in epochs, and an attention member's micro-batch, which goes round all FFN members."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from afd_ray.membership.events import Op, Roster
from afd_ray.membership.seat import Seat, Stale
from afd_ray.simulation.protocol.world import CONNECT_TIMEOUT_S, HELD_S, HOLD_S, Process, World

if TYPE_CHECKING:
    from afd_ray.simulation.protocol.cluster import Cluster
    from afd_ray.simulation.protocol.ingress import Stream

Reply = Callable[[str | None, str | None], None]
"""Takes the error, and the peer at the other end of the edge that it is about."""


class Held(NamedTuple):
    """A request in an attention member."""

    attempt: int
    position: int
    """Of the next token."""
    length: int
    stream: "Stream"


class Member(Process):
    """What both roles do: control calls about seats."""

    __slots__ = ("cluster", "edges", "loaded", "rosters", "seat", "watchers")

    def __init__(self, world: World, name: str, cluster: "Cluster") -> None:
        super().__init__(world, name)
        self.cluster = cluster
        self.seat: Seat = cluster.parts.seat(name)
        self.edges: dict[int, dict[str, int]] = {}
        """For each open seat the connection to each peer."""
        self.rosters: dict[int, Roster] = {}
        self.loaded = 0
        """The epoch whose weights stand by, or are served."""
        self.watchers: dict[int, Callable[[str, str | None], None]] = {}
        """Who is to be told when the seat of this epoch fails."""

    # --- control calls --------------------------------------------------------------------------------------------------------

    def called(self, op: Op, number: int, roster: Roster, takes_s: float, reply: Reply) -> None:
        """A call has come in, and is done some time later."""
        try:
            self.rosters[number] = roster
            if op == "load":
                self.seat.load(number)
            self.after(takes_s, self._do, op, number, reply)
        except Stale as error:
            reply(str(error), None)

    def _do(self, op: Op, number: int, reply: Reply) -> None:
        try:
            getattr(self, op)(number, reply)
        except Stale as error:
            reply(str(error), None)

    def load(self, number: int, reply: Reply) -> None:
        self.seat.load(number)
        self.loaded = number
        reply(None, None)

    def prepare(self, number: int, reply: Reply) -> None:
        self.close(self.seat.prepare(number))
        if self.loaded != number:
            reply(f"epoch {self.loaded} is loaded", None)
            return
        self.edges[number] = {}
        reply(None, None)

    def connect(self, number: int, reply: Reply) -> None:
        self.seat.connect(number)
        self._connect(number, reply, self.world.now + CONNECT_TIMEOUT_S)

    def resume(self, number: int, reply: Reply) -> None:
        self.seat.resume(number)
        self.may_have_work()
        reply(None, None)

    def discard(self, number: int, reply: Reply) -> None:
        self.close(self.seat.discard(number))
        reply(None, None)

    def switch(self, number: int, reply: Reply) -> None:
        if self.seat.switch(number):
            self.cluster.checks.switched(self.name, number, self.loaded)
            self.entered(number)
        reply(None, None)

    def retire(self, number: int, reply: Reply) -> None:
        for old in sorted(self.seat.retire(number)):
            self.close(old)
        if self.seat.serving == 0:
            self.cancel()
        reply(None, None)

    def watch(self, number: int, tell: Callable[[str, str | None], None]) -> None:
        """`lost(number)`: tell once the seat fails; at once where it has."""
        self.watchers[number] = tell
        if self.seat.failed(number):
            tell("its seat has failed", None)

    # --- the epoch's edges ----------------------------------------------------------------------------------------------------

    def peers(self, number: int) -> tuple[str, ...]:
        """Who has an edge to this one in that epoch."""
        roster = self.rosters[number]
        if self.name in roster.attention:
            return roster.ffn
        return tuple(member for member in roster.members if member != self.name)

    def _connect(self, number: int, reply: Reply, until_s: float) -> None:
        if self.seat.standby != number:
            reply("given up meanwhile", None)
            return
        edges: dict[str, int] = {}
        for name in self.peers(number):
            peer = self.cluster.members.get(name)
            if peer is None or not peer.alive or number not in peer.edges:
                reply(f"edge to {name}: refused", name)
                return
            edges[name] = self.world.link(self.name, name)
            if edges[name] < 0 or peer.paused:
                if self.world.now < until_s:
                    self.after(0.25, self._connect, number, reply, until_s)
                else:
                    reply(f"edge to {name}: no answer", name)
                return
        self.edges[number] = edges
        reply(None, None)

    def close(self, number: int) -> None:
        """Close the seat of this epoch (0: none): peers that still have theirs see the links break."""
        if self.edges.pop(number, None) is None:
            return
        if self.world.tracing:
            self.world.note(f"{self.name} closes its seat {number}")
        for name in self.peers(number):
            peer = self.cluster.members.get(name)
            if peer is not None and number in peer.edges:
                peer.after(self.world.delay(0.001, 0.02), peer.broke, number, self.name)

    def broke(self, number: int, peer: str) -> None:
        """The edge to this peer is gone."""
        if number not in self.edges:
            return
        if self.seat.broke(number):
            if self.world.tracing:
                self.world.note(f"{self.name} sees its link to {peer} break in epoch {number}")
            if number == self.seat.serving:
                self.cancel()
            tell = self.watchers.pop(number, None)
            if tell is not None:
                tell(f"link to {peer} broke", peer)

    def send(self, peer: "Member", number: int, action: Callable[..., None], *args: object) -> None:
        """Over the epoch's edge, if that is whole when the message leaves and when it arrives."""
        edge = self.edges[number].get(peer.name, -2) if number in self.edges else -2
        if edge == self.world.link(self.name, peer.name):
            self.world.after(self.world.delay(0.002, 0.02), peer.receive, self.name, number, edge, action, args)

    def receive(self, sender: str, number: int, edge: int, action: Callable[..., None], args: tuple[object, ...]) -> None:
        if number in self.edges and edge == self.world.link(self.name, sender):
            self.run(action, *args)

    # --- what the roles differ in ---------------------------------------------------------------------------------------------

    def entered(self, number: int) -> None:
        """It serves in this epoch now."""

    def cancel(self) -> None:
        """Take back what is in flight."""

    def may_have_work(self) -> None:
        """Something that kept it from running may be over."""


class FFN(Member):
    """Answers each DISPATCH of the epoch that it serves; those of a standby seat lie there until it is entered."""

    __slots__ = ("lying",)

    def __init__(self, world: World, name: str, cluster: "Cluster") -> None:
        super().__init__(world, name, cluster)
        self.lying: list[tuple[Attention, int, int]] = []

    def dispatch(self, sender: "Attention", number: int, step: int) -> None:
        if self.seat.serving == number and self.seat.may_run:
            self.send(sender, number, sender.partial, number, step, self.name, self.world.now)
        elif number == self.seat.standby:
            self.lying.append((sender, number, step))

    def entered(self, number: int) -> None:
        lying, self.lying = self.lying, []
        for entry in lying:
            self.dispatch(*entry)


class Attention(Member):
    """Runs all its requests in one micro-batch at a time."""

    __slots__ = ("drained", "first_s", "in_flight", "last_s", "missing", "requests", "step")

    def __init__(self, world: World, name: str, cluster: "Cluster") -> None:
        super().__init__(world, name, cluster)
        self.requests: dict[int, Held] = {}
        self.step = 0
        self.in_flight: list[tuple[int, int]] | None = None
        """Requests and attempts of the micro-batch under way."""
        self.missing: set[str] = set()
        self.first_s = self.last_s = 0.0
        """When the first and the last FFN member served the micro-batch under way."""
        self.drained: list[tuple[int, Reply]] = []

    # --- requests -------------------------------------------------------------------------------------------------------------

    def submit(self, request: int, held: Held) -> None:
        if self.seat.moving_out:
            held.stream.back(request, held.attempt)
            return
        known = self.requests.get(request)
        if known is None or known.attempt < held.attempt:
            self.requests[request] = held
            self.may_have_work()

    def stream_broke(self, stream: "Stream") -> None:
        """Nobody wants these tokens any more."""
        for request in [request for request, held in self.requests.items() if held.stream is stream]:
            del self.requests[request]

    # --- control --------------------------------------------------------------------------------------------------------------

    def move_out(self, number: int, reply: Reply) -> None:
        self.seat.move_out(number)
        self.after(HOLD_S, self._overdue, number)
        for request, held in self.requests.items():
            held.stream.back(request, held.attempt)
        self.requests.clear()
        reply(None, None)

    def drain(self, number: int, reply: Reply) -> None:
        self.seat.drain(number)
        self.after(HOLD_S, self._overdue, number)
        self.drained.append((number, reply))
        if self.in_flight is None:
            self._at_boundary()

    def _overdue(self, number: int) -> None:
        self.seat.overdue(number)
        self.may_have_work()

    def _at_boundary(self) -> None:
        drained, self.drained = self.drained, []
        for number, reply in drained:
            if self.seat.draining == number:
                self.cluster.checks.drained(self.name, number)
                if self.seat.held(number):
                    self.after(HELD_S, self._overdue, number)
                reply(None, None)
            else:
                reply("it went on meanwhile", None)

    # --- the micro-batch ------------------------------------------------------------------------------------------------------

    def entered(self, number: int) -> None:
        self.cancel()
        self.may_have_work()

    def cancel(self) -> None:
        self.step += 1
        self.in_flight = None
        self._at_boundary()

    def may_have_work(self) -> None:
        if self.in_flight is None and self.requests and self.seat.may_run:
            self.step += 1
            self.in_flight = [(request, held.attempt) for request, held in self.requests.items()]
            self.after(self.world.delay(0.04, 0.12), self._send, self.step)

    def _send(self, step: int) -> None:
        if step != self.step or self.in_flight is None:
            return
        number = self.seat.serving
        ffn = self.rosters[number].ffn
        self.missing = set(ffn)
        self.first_s = self.last_s = self.world.now
        for name in ffn:
            peer = self.cluster.members.get(name)
            if isinstance(peer, FFN):
                self.send(peer, number, peer.dispatch, self, number, step)
        if not ffn:
            self._emit(number)

    def partial(self, number: int, step: int, sender: str, served_s: float) -> None:
        if step != self.step or self.in_flight is None or sender not in self.missing:
            return
        self.first_s = served_s if len(self.missing) == len(self.rosters[number].ffn) else min(self.first_s, served_s)
        self.last_s = max(self.last_s, served_s)
        self.missing.discard(sender)
        if not self.missing:
            self._emit(number)

    def _emit(self, number: int) -> None:
        assert self.in_flight is not None
        batch, self.in_flight = self.in_flight, None
        streams: dict[Stream, list[tuple[int, int, int, int]]] = {}
        for request, attempt in batch:
            held = self.requests.get(request)
            if held is None or held.attempt != attempt:
                continue
            token = token_of(request, held.position)
            streams.setdefault(held.stream, []).append((request, attempt, held.position, token))
            if held.position + 1 < held.length:
                self.requests[request] = held._replace(position=held.position + 1)
            else:
                del self.requests[request]
        for stream, tokens in streams.items():
            stream.tokens(number, self.first_s, self.last_s, tokens)
        self._at_boundary()
        self.may_have_work()


def token_of(request: int, position: int) -> int:
    """What every member gives at this place of this request."""
    return (request * 7919 + position * 104729 + 17) & 0xFFFF
