"""The side of a leaving attention actor that others fetch keys and values from."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from afd_ray.handoff.gate import Gate
from afd_ray.handoff.handshake import Claim, Verdict
from afd_ray.handoff.kv_wire import KV_EPOCH, KVAnswer, KVOrder, Layers, receive_order, send_answer, send_layers
from afd_ray.handoff.poller import Poller

logger = logging.getLogger(__name__)

STALL_S = 5.0
"""For the peer to take what one layer has."""


class Lot(NamedTuple):
    """What is given for an order; it stays where it lies until it is let go of."""

    answer: KVAnswer
    layers: Layers


NOTHING = KVAnswer(0, 0)
Lend = Callable[[KVOrder], Lot | None]
"""None: there is nothing for this order."""


class KVServer:
    """Listens from the start; `lend` and `let_go` are called on a thread of each connection, `let_go` once for each lot."""

    def __init__(self, host: str, secret: bytes, digest: int, lend: Lend, let_go: Callable[[bytes], None]) -> None:
        """Raises OSError for an address that cannot be bound."""
        self._digest, self._lend, self._let_go = digest, lend, let_go
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._poller = Poller("kv-server")
        self._gate = Gate(host, secret, self._poller, self._judge, self._admit)
        self.address = f"{host}:{self._gate.port}"
        self._gate.open()
        self._poller.start()

    def close(self) -> None:
        """Hang up; returns when nobody reads from the cache any more."""
        self._poller.close(self._gate.close)
        for connection in list(self._connections):
            with suppress(OSError):  # it may have ended just now
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _judge(self, claim: Claim) -> tuple[Verdict, int, int]:
        verdict = Verdict.WELCOME
        if claim.epoch != KV_EPOCH:
            verdict = Verdict.EPOCH
        elif claim.digest != self._digest:
            verdict = Verdict.DIGEST
        return verdict, KV_EPOCH, self._digest

    def _admit(self, claim: Claim, connection: socket.socket) -> None:
        self._connections.add(connection)
        thread = threading.Thread(target=self._serve, args=(connection,), name="kv-server", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while (order := receive_order(connection)) is not None:
                self._answer(connection, order)
        except (OSError, RuntimeError) as error:  # who lends may be over
            logger.warning("keys and values were not all taken: %s", error)
        finally:
            self._connections.discard(connection)
            connection.close()

    def _answer(self, connection: socket.socket, order: KVOrder) -> None:
        lot = self._lend(order)
        try:
            send_answer(connection, lot.answer if lot else NOTHING, time.monotonic() + STALL_S)
            for views in lot.layers if lot else ():
                send_layers(connection, [views], time.monotonic() + STALL_S)
        finally:
            if lot is not None:
                self._let_go(order.key)
