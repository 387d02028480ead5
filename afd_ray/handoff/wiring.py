"""The connections of one member: who is let in, who is dialled, what carries each edge, and which edge broke."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from afd_ray.handoff import shm
from afd_ray.handoff.breaks import Breaks, Life
from afd_ray.handoff.endpoint import Endpoint
from afd_ray.handoff.gate import Gate, dial
from afd_ray.handoff.gloo import GlooEdge, GlooInlet, Meeting, join_meeting, pair_up
from afd_ray.handoff.handshake import NONCE_BYTES, Carrier, Claim, Verdict, digest_mismatch, judge
from afd_ray.handoff.inbound import Inbound
from afd_ray.handoff.intake import Intake
from afd_ray.handoff.message import LinkError
from afd_ray.handoff.poller import GONE, READ, Poller
from afd_ray.handoff.tcp import PEER_CLOSED, TcpEdge, TcpInlet, notice_silence
from afd_ray.handoff.terms import LinkKind, Terms

OWN_CLOSE = "this mesh is closed"

_CONNECT_POLL_S = 0.5e-3

_log = logging.getLogger(__name__)

Outbound = shm.ShmEdge | TcpEdge | GlooEdge


class Wiring:
    """Owns the segment, the sockets and the thread that watches them; tells the doorbell when an edge breaks."""

    def __init__(self, terms: Terms, peers: Mapping[int, int]) -> None:
        self.outbound: dict[int, Outbound] = {}
        self.any_broken = False
        self.breaks = Breaks()
        self._closed = False
        self._terms = terms
        self._capacities: dict[int, int] = {}
        self._connections: list[socket.socket] = []
        nonce = secrets.token_bytes(shm.NONCE_BYTES)
        self._segment = _segment(terms.kind, peers, nonce)
        self.intake = Intake()
        self.doorbell = self._segment.doorbell(self.intake.poke)
        self.inbound = [Inbound(peer, self._segment.rings[peer], terms.epoch, terms.digest) for peer in sorted(peers)]
        self._poller = Poller(f"mesh-{terms.rank}-e{terms.epoch}")
        try:
            self._gate = Gate(terms.host, terms.secret, self._poller, self._judge, self._admit)
        except OSError:
            self._segment.unlink()
            raise
        self._meeting = Meeting(terms.host) if terms.kind == "gloo" else None
        self._gloo_inlets: list[GlooInlet] = []
        self.endpoint = Endpoint(
            rank=terms.rank,
            host=terms.host,
            port=self._gate.port,
            segment=self._segment.name,
            nonce=nonce,
            digest=terms.digest,
            pid=os.getpid(),
            meeting_port=self._meeting.port if self._meeting else 0,
            rings=dict(peers),
        )
        self._gate.open()
        self._poller.watch(self.intake, 0, self._help)
        self._poller.start()

    def connect(self, endpoints: Mapping[int, Endpoint], timeout_s: float, greet: Callable[[int], None]) -> None:
        """Connect to every peer and wait until every peer has connected; after a failure only `close` is left.

        `greet` is called for each peer as soon as there is a way to it, on any thread.
        """
        deadline_s = time.monotonic() + timeout_s
        missing = [edge.peer for edge in self.inbound if edge.peer not in endpoints]
        if missing:
            raise LinkError(missing[0], f"no endpoint is known; missing ranks: {_listed(missing)}")
        for edge in self.inbound:
            self._check(edge.peer, endpoints[edge.peer])
        self._dial_all(endpoints, deadline_s, greet)
        self._await_inbound(timeout_s, deadline_s)
        if self._meeting is not None:
            for edge in self.inbound:
                self._pair_up(edge, endpoints[edge.peer], self._meeting, deadline_s)
                greet(edge.peer)
        self._check_open()
        self._segment.unlink()
        self._poller.call(self._gate.close)

    def _dial_all(self, endpoints: Mapping[int, Endpoint], deadline_s: float, greet: Callable[[int], None]) -> None:
        """All at once: what one peer does not answer is not to look to the others as if this member did not."""

        def dial_one(peer: int) -> None:
            self._dial(peer, endpoints[peer], deadline_s)
            if self._meeting is None:
                greet(peer)

        with ThreadPoolExecutor(max(1, len(self.inbound))) as pool:
            dials = [pool.submit(dial_one, edge.peer) for edge in self.inbound]
        for dialled in dials:
            dialled.result()

    def _await_inbound(self, timeout_s: float, deadline_s: float) -> None:
        while late := [edge.peer for edge in self.inbound if not edge.kind]:
            self._check_open()
            self.raise_broken()
            if time.monotonic() > deadline_s:
                raise LinkError(late[0], f"it has not connected in {timeout_s:g} s; missing ranks: {_listed(late)}")
            time.sleep(_CONNECT_POLL_S)

    def lend_intake(self) -> None:
        """The receiving thread leaves: what arrives is read for it, lest a large message wait in the sender's kernel."""
        self.intake.lend()
        self._poller.watch_once(self.intake, READ)

    def reclaim_intake(self) -> None:
        """The receiving thread is back, and is not to share its sockets or its interpreter."""
        self.intake.reclaim()
        self._poller.watch_once(self.intake, 0)

    def capacity_to(self, peer: int) -> int:
        """Bytes of the ring that the peer has for this member."""
        return self._capacities[peer]

    def raise_broken(self) -> None:
        """LinkError for the first broken edge, if any."""
        for edge in (*self.inbound, *self.outbound.values()):
            if edge.broken is not None:
                raise LinkError(edge.peer, edge.broken)

    def _check_open(self) -> None:
        """LinkError when the mesh was closed meanwhile: another thread may close it while others connect."""
        if self._closed:
            raise LinkError(self._terms.rank, OWN_CLOSE)

    def _check(self, peer: int, endpoint: Endpoint) -> None:
        if endpoint.digest != self._terms.digest:
            raise LinkError(peer, digest_mismatch(endpoint.digest, self._terms.digest))
        if endpoint.rank != peer or self._terms.rank not in endpoint.rings:
            raise LinkError(peer, f"its endpoint is of rank {endpoint.rank}, with rings for ranks {_listed(endpoint.rings)}")

    def _dial(self, peer: int, endpoint: Endpoint, deadline_s: float) -> None:
        terms = self._terms
        self._check_open()
        self._capacities[peer] = endpoint.rings[terms.rank]
        segment = self._attach(peer, endpoint)
        carrier = Carrier.GLOO if terms.kind == "gloo" else Carrier.SHM if segment else Carrier.TCP
        claim = Claim(carrier, terms.rank, peer, terms.epoch, terms.digest, secrets.token_bytes(NONCE_BYTES))
        connection = dial(
            endpoint.host,
            endpoint.port,
            source_host=terms.host,
            secret=terms.secret,
            claim=claim,
            deadline_s=deadline_s,
            reach_s=terms.reach_s,
        )
        if self._closed:
            connection.close()
            self._check_open()
        if carrier is Carrier.GLOO:
            self._connections.append(connection)
        elif segment:
            self._connections.append(connection)
            edge = shm.ShmEdge(
                peer, segment, connection, rank=terms.rank, digest=terms.digest, send_timeout_s=terms.send_timeout_s
            )
            self._poller.call(partial(self._watch_life, connection, partial(self._break_outbound, edge)))
            self.outbound[peer] = edge
        else:
            capacity_bytes, timeout_s = self._capacities[peer], terms.send_timeout_s
            self._listen_for_silence(connection)
            socket_edge = TcpEdge(
                peer,
                connection,
                self._poller,
                capacity_bytes=capacity_bytes,
                digest=terms.digest,
                send_timeout_s=timeout_s,
                on_broken=partial(self.breaks.tell, peer),
            )
            self._poller.call(socket_edge.watch)
            self.outbound[peer] = socket_edge

    def _pair_up(self, edge: Inbound, endpoint: Endpoint, meeting: Meeting, deadline_s: float) -> None:
        """Meet one peer over gloo. All members take their peers in the order of ranks, so nobody waits in a circle."""
        terms, peer = self._terms, edge.peer
        first, second = sorted((terms.rank, peer))
        timeout_s = max(deadline_s - time.monotonic(), 1e-3)
        try:
            store = meeting.store if terms.rank == first else join_meeting(endpoint.host, endpoint.meeting_port, timeout_s)
            group = pair_up(store, f"{first}-{second}", first=terms.rank == first, host=terms.host, timeout_s=timeout_s)
        except RuntimeError as error:
            raise LinkError(peer, f"gloo could not connect: {str(error).splitlines()[0]}") from None
        self.outbound[peer] = GlooEdge(
            peer, group, capacity_bytes=self._capacities[peer], digest=terms.digest, send_timeout_s=terms.send_timeout_s
        )
        on_broken = partial(self._break_inbound, edge)
        self._gloo_inlets.append(GlooInlet(group, edge.memory, self.doorbell.ring, on_broken))

    def _attach(self, peer: int, endpoint: Endpoint) -> shm.Segment | None:
        if self._terms.kind in ("tcp", "gloo") or not shm.supported():
            return None
        segment = shm.attach_segment(endpoint.segment, endpoint.nonce, endpoint.rings)
        if segment is None and self._terms.kind == "shm":
            raise LinkError(peer, f"its shared segment {endpoint.segment or '(none)'} is not on this host")
        return segment

    # On the poller's thread:

    def _help(self, _events: int) -> None:
        if self.intake.help():
            self.doorbell.ring()  # the receiver may have come back just before
            self._poller.watch_once(self.intake, READ)

    def _judge(self, claim: Claim) -> tuple[Verdict, int, int]:
        terms = self._terms
        expected = frozenset(edge.peer for edge in self.inbound if not edge.kind)
        carriers = frozenset([Carrier.GLOO] if terms.kind == "gloo" else [Carrier.SHM, Carrier.TCP])
        verdict = judge(claim, rank=terms.rank, epoch=terms.epoch, digest=terms.digest, expected=expected, carriers=carriers)
        return verdict, terms.epoch, terms.digest

    def _admit(self, claim: Claim, connection: socket.socket) -> None:
        edge = next(edge for edge in self.inbound if edge.peer == claim.source)
        on_broken = partial(self._break_inbound, edge)
        self._connections.append(connection)
        if claim.carrier == Carrier.GLOO:
            edge.kind = "gloo"
        elif claim.carrier == Carrier.SHM:
            self._watch_life(connection, on_broken)
            self.intake.add(Life(connection, on_broken))
            edge.kind = "shm"
        else:
            self._listen_for_silence(connection)
            self._watch_life(connection, partial(self.breaks.tell, edge.peer))  # what came before may not be read yet
            self.intake.add(TcpInlet(connection, edge.memory, on_broken))
            edge.kind = "tcp"

    def _listen_for_silence(self, connection: socket.socket) -> None:
        if self._terms.silence_s is not None:
            notice_silence(connection, self._terms.silence_s)

    def _watch_life(self, connection: socket.socket, on_broken: Callable[[str], None]) -> None:
        """Hear of the connection's end whether or not this member is looking."""
        self._poller.watch(connection, GONE, lambda _events: self._on_gone(connection, on_broken))

    def _on_gone(self, connection: socket.socket, on_broken: Callable[[str], None]) -> None:
        self._poller.forget(connection)
        on_broken(PEER_CLOSED)

    def _break_inbound(self, edge: Inbound, reason: str) -> None:
        outbound = self.outbound.get(edge.peer)
        if outbound is not None:
            outbound.fail(reason)  # first: whoever hears of the break may not send either
        edge.broken = reason
        self.any_broken = True
        self.doorbell.wake()
        self.breaks.tell(edge.peer, reason)

    def _break_outbound(self, edge: shm.ShmEdge, reason: str) -> None:
        edge.fail(reason)
        self.breaks.tell(edge.peer, reason)

    def close(self) -> None:
        """Leave the group; harmless to repeat, from any thread."""
        self._closed = True
        self._poller.close(self._close_all)

    def _close_all(self) -> None:
        self._poller.forget(self.intake)
        self._gate.close()
        for edge in self.outbound.values():
            edge.close()
        for inlet in self._gloo_inlets:
            inlet.close()
        self.intake.close(self._hang_up)
        self._segment.unlink()
        del self._gate  # it refers back here: the rings are unmapped with the last user and not at some collection
        self.doorbell.wake()

    def _hang_up(self) -> None:
        for connection in self._connections:
            self._poller.forget(connection)
            connection.close()


def _segment(kind: LinkKind, peers: Mapping[int, int], nonce: bytes) -> shm.Segment:
    if kind in ("tcp", "gloo") or (kind == "auto" and not shm.supported()):
        return shm.private_segment(peers)
    if not shm.supported():
        raise ValueError("link kind is shm: it needs an x86-64 Linux host, allowed here: auto, tcp")
    try:
        return shm.create_segment(peers, nonce)
    except OSError as error:
        if kind == "shm":
            raise
        _log.warning("no shared segment of %d bytes (%s): this member is reached by tcp", sum(peers.values()), error.strerror)
        return shm.private_segment(peers)


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(str(rank) for rank in sorted(ranks))
