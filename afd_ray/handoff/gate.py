"""The door of a member: where peers dial in, prove themselves, and strangers are turned away."""

import logging
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic

from afd_ray.handoff import handshake
from afd_ray.handoff.handshake import Claim, Verdict
from afd_ray.handoff.message import LinkError
from afd_ray.handoff.poller import READ, Poller
from afd_ray.handoff.tcp import tune
from afd_ray.refusals import RefusalLog

_MAX_UNPROVEN = 64
_FIRST_TRY_S = 0.25
"""For a peer's kernel to answer; each further try gets twice as long. This side's kernel would send a lost packet again after a second only."""

_log = logging.getLogger(__name__)

Judge = Callable[[Claim], tuple[Verdict, int, int]]
Admit = Callable[[Claim, socket.socket], None]


class _Visitor:
    """A connection that has not proved itself yet."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        self.connection = connection
        self.address = address
        self.challenge = handshake.challenge(secrets.token_bytes(handshake.NONCE_BYTES))
        self.hello = b""


class Gate:
    """Listens on one address; lives on the poller's thread once it is open."""

    def __init__(self, host: str, secret: bytes, poller: Poller, judge: Judge, admit: Admit) -> None:
        """`judge` gives the verdict on a proven claim with this side's epoch and digest; `admit` gets the welcome ones."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=128)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on host {host}: {error.strerror}") from None
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._secret = secret
        self._poller = poller
        self._judge = judge
        self._admit = admit
        self._visitors: list[_Visitor] = []
        self._refusals = RefusalLog(_log)

    def open(self) -> None:
        self._poller.watch(self._listener, READ, self._on_visit)

    def close(self) -> None:
        self._poller.forget(self._listener)
        self._listener.close()
        for visitor in list(self._visitors):
            self._turn_away(visitor, None)

    def _on_visit(self, _events: int) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:
            return
        tune(connection)
        if len(self._visitors) >= _MAX_UNPROVEN:
            self._turn_away(self._visitors[0], "it took too long")
        visitor = _Visitor(connection, f"{address[0]}:{address[1]}")
        self._visitors.append(visitor)
        with suppress(OSError):
            connection.send(visitor.challenge)
        self._poller.watch(connection, READ, partial(self._on_bytes, visitor))

    def _on_bytes(self, visitor: _Visitor, _events: int) -> None:
        try:
            received = visitor.connection.recv(handshake.HELLO_BYTES - len(visitor.hello))
        except BlockingIOError:
            return
        except OSError:
            received = b""
        visitor.hello += received
        if not received:
            self._turn_away(visitor, "it left before it had said who it is")
        elif len(visitor.hello) == handshake.HELLO_BYTES:
            self._on_hello(visitor)

    def _on_hello(self, visitor: _Visitor) -> None:
        try:
            claim = handshake.read_hello(self._secret, visitor.challenge, visitor.hello)
        except ValueError as error:
            self._turn_away(visitor, str(error))
            return
        verdict, epoch, digest = self._judge(claim)
        with suppress(OSError):
            visitor.connection.send(handshake.welcome(self._secret, visitor.hello, verdict, epoch, digest))
        if verdict is not Verdict.WELCOME:
            self._turn_away(visitor, f"rank {claim.source}, epoch {claim.epoch}, does not match: {verdict.name.lower()}")
            return
        self._visitors.remove(visitor)
        self._poller.forget(visitor.connection)
        self._admit(claim, visitor.connection)

    def _turn_away(self, visitor: _Visitor, reason: str | None) -> None:
        if reason is not None:
            self._refusals.add(visitor.address, reason)
        self._visitors.remove(visitor)
        self._poller.forget(visitor.connection)
        visitor.connection.close()


def dial(
    host: str,
    port: int,
    *,
    source_host: str,
    secret: bytes,
    claim: Claim,
    deadline_s: float,
    reach_s: float | None = None,
) -> socket.socket:
    """A connection to the gate of rank `claim.target`, both sides proven; LinkError, naming the rank.

    `deadline_s` is on the monotonic clock. `reach_s`: how long the peer's kernel, which answers whatever the peer is doing, may take; None: until then.
    """
    peer = claim.target
    reached_by_s = deadline_s if reach_s is None else min(deadline_s, monotonic() + reach_s)
    try:
        connection = _reach((host, port), source_host, reached_by_s)
    except TimeoutError:
        raise LinkError(peer, f"no answer from {host}:{port} in time") from None
    except OSError as error:
        raise LinkError(peer, f"{host}:{port} cannot be reached from {source_host} ({error.strerror})") from None
    try:
        _introduce(connection, secret, claim, deadline_s)
        tune(connection)
    except TimeoutError:
        connection.close()
        raise LinkError(peer, f"{host}:{port} did not finish the handshake in time") from None
    except (OSError, ValueError) as error:
        connection.close()
        raise LinkError(peer, f"handshake with {host}:{port} failed: {error}") from None
    return connection


def _reach(address: tuple[str, int], source_host: str, until_s: float) -> socket.socket:
    """Connected. Raises TimeoutError when nothing has answered by then, OSError at once for an answer that refuses."""
    try_s = _FIRST_TRY_S
    while True:
        try:
            return socket.create_connection(address, timeout=min(try_s, _left_s(until_s)), source_address=(source_host, 0))
        except TimeoutError:
            if monotonic() >= until_s:
                raise
        try_s *= 2


def _introduce(connection: socket.socket, secret: bytes, claim: Claim, deadline_s: float) -> None:
    received = _read(connection, handshake.CHALLENGE_BYTES, deadline_s)
    handshake.check_challenge(received)
    sent = handshake.hello(secret, received, claim)
    connection.sendall(sent)
    handshake.read_welcome(secret, sent, _read(connection, handshake.WELCOME_BYTES, deadline_s), claim)


def _read(connection: socket.socket, size_bytes: int, deadline_s: float) -> bytes:
    received = b""
    while len(received) < size_bytes:
        connection.settimeout(_left_s(deadline_s))
        part = connection.recv(size_bytes - len(received))
        if not part:
            raise ValueError("it hung up (does it have the same cluster secret?)")
        received += part
    return received


def _left_s(deadline_s: float) -> float:
    return max(deadline_s - monotonic(), 1e-3)
