"""An ingress replica: clients' requests, the stream to each attention member, and which tokens reach the clients."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from afd_ray.membership.attempts import Journal
from afd_ray.simulation.protocol.members import Attention, Held
from afd_ray.simulation.protocol.world import Process, World

if TYPE_CHECKING:
    from afd_ray.simulation.protocol.cluster import Cluster

RETRY_S = 0.3


class Stream:
    """One connection between an ingress and an attention member, in order both ways until it breaks."""

    __slots__ = ("_arrivals", "broken", "edge", "ingress", "member")

    def __init__(self, ingress: "Ingress", member: Attention) -> None:
        self.ingress, self.member = ingress, member
        self.edge = ingress.world.link(ingress.name, member.name)
        self.broken = False
        self._arrivals: dict[str, float] = {}

    def submit(self, request: int, held: Held) -> None:
        self._send(self.member, self.member.submit, request, held)

    def tokens(self, epoch: int, first_s: float, last_s: float, tokens: list[tuple[int, int, int, int]]) -> None:
        """Each a request, attempt, position and token; between which times the FFN members of which epoch served them."""
        self._send(self.ingress, self.ingress.tokens, self, epoch, first_s, last_s, tokens)

    def back(self, request: int, attempt: int) -> None:
        """The member does not serve this request (any more)."""
        self._send(self.ingress, self.ingress.moved, request, attempt)

    def snap(self) -> None:
        """The connection is gone; both ends hear of it a little later."""
        if not self.broken:
            self.broken = True
            world = self.ingress.world
            self.ingress.after(world.delay(0.001, 0.03), self.ingress.stream_broke, self)
            self.member.after(world.delay(0.001, 0.03), self.member.stream_broke, self)

    def _send(self, to: Process, action: Callable[..., None], *args: Any) -> None:
        if self.broken:
            return
        world = to.world
        arrival_s = max(self._arrivals.get(to.name, 0.0), world.now + world.delay(0.002, 0.02))
        self._arrivals[to.name] = arrival_s
        world.after(arrival_s - world.now, self._arrive, to, action, args)

    def _arrive(self, to: Process, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self.broken:
            to.run(action, *args)


class Ingress(Process):
    """Gives requests to attention members and takes their tokens; a death of its own ends its clients' requests."""

    __slots__ = ("at", "cluster", "journals", "leaving", "lengths", "retrying", "streams", "takers", "version", "waiting")

    def __init__(self, world: World, name: str, cluster: "Cluster") -> None:
        super().__init__(world, name)
        self.cluster = cluster
        self.journals: dict[int, Journal] = {}
        self.lengths: dict[int, int] = {}
        self.at: dict[int, str] = {}
        """The member that each request was given to."""
        self.waiting: list[int] = []
        self.streams: dict[str, Stream] = {}
        self.takers: tuple[str, ...] = ()
        self.leaving: tuple[str, ...] = ()
        self.version = (0, 0)
        self.retrying = False

    def request(self, request: int, length: int) -> None:
        """A client wants this many tokens."""
        self.journals[request] = self.cluster.parts.journal()
        self.lengths[request] = length
        self._give(request)

    def view(self, version: tuple[int, int], takers: tuple[str, ...], leaving: tuple[str, ...]) -> None:
        """Who takes requests, as the controller of that incarnation sees it; later answers come later."""
        if version <= self.version:
            return
        self.version, self.takers, self.leaving = version, takers, leaving
        for request, name in list(self.at.items()):
            if name not in takers and name not in leaving:
                self._give(request)
        self._retry()

    def tokens(self, stream: Stream, epoch: int, first_s: float, last_s: float, tokens: list[tuple[int, int, int, int]]) -> None:
        for request, attempt, position, token in tokens:
            journal = self.journals.get(request)
            if journal is None or not journal.accept(attempt, position, token):
                continue
            self.cluster.checks.accepted(request, attempt, token, epoch, first_s, last_s, stream.member.name)
            if len(self.cluster.checks.streams[request]) >= self.lengths[request]:
                self._end(request)

    def moved(self, request: int, attempt: int) -> None:
        journal = self.journals.get(request)
        if journal is not None and journal.attempt == attempt:
            self._give(request)

    def stream_broke(self, stream: Stream) -> None:
        name = stream.member.name
        if self.streams.get(name) is stream:
            del self.streams[name]
            for request in [request for request, at in self.at.items() if at == name]:
                self._give(request)

    def die(self) -> None:
        self.alive = False
        for stream in self.streams.values():
            stream.snap()
        for request in self.journals:
            self.cluster.checks.failed(request)

    def _give(self, request: int) -> None:
        """To the member with the fewest requests among those that can be reached."""
        self.at.pop(request, None)
        counts = {name: 0 for name in self.takers if self._reaches(name)}
        if not counts:
            self.waiting.append(request)
            if not self.retrying:
                self.retrying = True
                self.after(RETRY_S, self._retry)
            return
        for name in self.at.values():
            if name in counts:
                counts[name] += 1
        name = min(counts, key=lambda one: (counts[one], one))
        journal = self.journals[request]
        attempt = journal.begin()
        self.cluster.checks.began(request, attempt)
        if self.world.tracing:
            self.world.note(f"{self.name} gives request {request} to {name}, attempt {attempt} from {len(journal.tokens)}")
        self.at[request] = name
        stream = self.streams[name]
        stream.submit(request, Held(attempt, len(journal.tokens), self.lengths[request], stream))

    def _reaches(self, name: str) -> bool:
        if name in self.streams:
            return True
        member = self.cluster.members.get(name)
        if not isinstance(member, Attention) or not member.alive or self.world.link(self.name, name) < 0:
            return False
        self.streams[name] = Stream(self, member)
        return True

    def _retry(self) -> None:
        self.retrying = False
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            if request in self.journals:
                self._give(request)

    def _end(self, request: int) -> None:
        del self.journals[request]
        self.at.pop(request, None)
        self.cluster.checks.ended(request)
