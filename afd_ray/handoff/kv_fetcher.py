"""The side of an attention actor that fetches keys and values from those that leave."""

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from afd_ray.handoff.gate import dial
from afd_ray.handoff.handshake import NONCE_BYTES, Carrier, Claim
from afd_ray.handoff.kv_wire import KV_EPOCH, KVAnswer, KVOrder, Layers, receive_answer, receive_layers, send_order
from afd_ray.handoff.message import LinkError
from afd_ray.request import KVTicket

logger = logging.getLogger(__name__)

FORGETTING = 0.8
"""What is left of an earlier transfer's weight after each later one."""
UNKNOWN_LATENCY_S, UNKNOWN_BYTES, UNKNOWN_S = 1e-3, 1e6, 0.01
"""What a host that nothing came from yet is taken for: a gigabit link."""
LATE_S, LATE_FACTOR = 1.0, 4.0
"""A fetch is given up when it takes this much longer than it was expected to."""


class LinkRate:
    """What the transfers from one host have come to, the last ones counting most."""

    def __init__(self) -> None:
        self._latency_s, self._size_bytes, self._copying_s = UNKNOWN_LATENCY_S, UNKNOWN_BYTES, UNKNOWN_S

    def expected_s(self, size_bytes: int) -> float:
        """For so many bytes."""
        return self._latency_s + size_bytes * self._copying_s / self._size_bytes

    def note(self, latency_s: float, size_bytes: int, copying_s: float) -> None:
        """So many bytes began to come after `latency_s`, connecting included, and all were there `copying_s` later."""
        self._latency_s = self._latency_s * FORGETTING + latency_s * (1 - FORGETTING)
        self._size_bytes = self._size_bytes * FORGETTING + size_bytes
        self._copying_s = self._copying_s * FORGETTING + copying_s


Done = Callable[[float, str], None]
"""Called on a thread of the fetcher's with the seconds that a fetch took and why it failed (one line; empty: it did not)."""


class Fetch(NamedTuple):
    """One request's keys and values, and where they are to lie."""

    ticket: KVTicket
    positions: int
    """At most the ticket's; 0: none, the ticket is given back."""
    size_bytes: int
    layers: Layers
    done: Done
    deadline_s: float
    """On the monotonic clock."""


class KVFetcher:
    """Fetches without being waited for: one after the other from each address, on a thread that ends when there is no more to fetch."""

    def __init__(self, host: str, secret: bytes, digest: int) -> None:
        """`host`: the address of this side. `digest`: `kv_digest` of the cache."""
        self._host, self._secret, self._digest = host, secret, digest
        self._lock = threading.Lock()
        self._queues: dict[str, deque[Fetch]] = {}
        self._queued_bytes = 0
        self._rates: dict[str, LinkRate] = {}

    def expected_s(self, ticket: KVTicket, size_bytes: int) -> float:
        """From now until so many bytes more are here, after those that are to come before."""
        with self._lock:
            return self._rate(ticket).expected_s(self._queued_bytes + size_bytes)

    def fetch(self, ticket: KVTicket, positions: int, size_bytes: int, layers: Layers, done: Done) -> None:
        """Returns at once; `done` says how it went. It is given up when it takes much longer than expected."""
        late_s = LATE_S + LATE_FACTOR * self.expected_s(ticket, size_bytes)
        self._queue(Fetch(ticket, positions, size_bytes, layers, done, time.monotonic() + late_s))

    def give_back(self, ticket: KVTicket) -> None:
        """It is not going to be fetched: who has it may forget it."""
        self._queue(Fetch(ticket, 0, 0, (), lambda _duration_s, _reason: None, time.monotonic() + LATE_S))

    def _queue(self, fetch: Fetch) -> None:
        address = fetch.ticket.address
        with self._lock:
            self._queued_bytes += fetch.size_bytes
            queue = self._queues.get(address)
            if queue is not None:
                queue.append(fetch)
                return
            self._queues[address] = deque([fetch])
        threading.Thread(target=self._work, args=(address,), name="kv-fetcher", daemon=True).start()

    def _next(self, address: str) -> Fetch | None:
        """None: there is no more, and the thread is to end."""
        with self._lock:
            if self._queues[address]:
                return self._queues[address].popleft()
            del self._queues[address]
            return None

    def _work(self, address: str) -> None:
        connection: socket.socket | None = None
        while (fetch := self._next(address)) is not None:
            started_s, failure = time.monotonic(), ""
            try:
                connection = connection or self._connect(address, fetch.deadline_s)
                self._take(connection, fetch, started_s)
            except (OSError, LinkError, ValueError) as error:
                failure = str(error)
                if connection is not None:
                    connection.close()
                    connection = None
            self._finish(fetch, time.monotonic() - started_s, failure)
        if connection is not None:
            connection.close()

    def _finish(self, fetch: Fetch, duration_s: float, failure: str) -> None:
        with self._lock:
            self._queued_bytes -= fetch.size_bytes
        if failure and fetch.positions:
            logger.warning("keys and values from %s: %s", fetch.ticket.address, failure)
        fetch.done(duration_s, failure)

    def _connect(self, address: str, deadline_s: float) -> socket.socket:
        host, _, port = address.rpartition(":")
        claim = Claim(Carrier.TCP, 0, 0, KV_EPOCH, self._digest, os.urandom(NONCE_BYTES))
        return dial(host, int(port), source_host=self._host, secret=self._secret, claim=claim, deadline_s=deadline_s)

    def _take(self, connection: socket.socket, fetch: Fetch, started_s: float) -> None:
        send_order(connection, KVOrder(fetch.ticket.key, fetch.positions), fetch.deadline_s)
        answer = receive_answer(connection, fetch.deadline_s)
        if answer != KVAnswer(fetch.positions, fetch.size_bytes):
            raise ValueError(f"{answer.positions} positions in {answer.size_bytes} bytes are there, not what was promised")
        if not fetch.positions:
            return
        answered_s = time.monotonic()
        receive_layers(connection, fetch.layers, fetch.deadline_s)
        with self._lock:
            self._rate(fetch.ticket).note(answered_s - started_s, fetch.size_bytes, time.monotonic() - answered_s)

    def _rate(self, ticket: KVTicket) -> LinkRate:
        """Of the link from that host."""
        return self._rates.setdefault(ticket.address.rpartition(":")[0], LinkRate())
