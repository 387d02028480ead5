"""How the keys and values of a request cross: orders and their answers on a connection that is proven, then bytes from cache to cache."""

import hashlib
import json
import socket
from collections.abc import Iterable
from struct import Struct
from time import monotonic
from typing import NamedTuple

import torch

from afd_ray.handoff.tcp import unsent

KEY_BYTES = 16
KV_EPOCH = 0
"""In the handshake's claim: no group has this epoch, so that neither connection passes for the other."""

_ORDER = Struct(f"<{KEY_BYTES}sI")
_ANSWER = Struct("<IQ")
_MOST_VIEWS = 512
"""A call of the kernel's vectored interface takes 1,024."""

Layers = Iterable[list[memoryview]]
"""For each layer where its bytes lie, in the order of the positions."""


class KVOrder(NamedTuple):
    """What is wanted of the request with this key: the first so many positions; none of it is kept after that. 0: nothing is wanted."""

    key: bytes
    positions: int


class KVAnswer(NamedTuple):
    """What follows: so many positions in so many bytes; 0: nothing, there is no such request."""

    positions: int
    size_bytes: int


def kv_digest(model_digest: int, layers: int, head_dim: int, dtype: torch.dtype) -> int:
    """64 bits that differ where the keys and values of one actor mean nothing to another."""
    terms = {"model": model_digest, "layers": layers, "head_dim": head_dim, "kv_dtype": str(dtype)}
    return int.from_bytes(hashlib.blake2b(json.dumps(terms, sort_keys=True).encode(), digest_size=8).digest(), "little")


def send_order(connection: socket.socket, order: KVOrder, deadline_s: float) -> None:
    _send(connection, [memoryview(_ORDER.pack(*order))], deadline_s)


def receive_order(connection: socket.socket) -> KVOrder | None:
    """Waits as long as it takes; None when the other side has hung up."""
    connection.settimeout(None)
    received = connection.recv(_ORDER.size, socket.MSG_WAITALL)
    return KVOrder(*_ORDER.unpack(received)) if len(received) == _ORDER.size else None


def send_answer(connection: socket.socket, answer: KVAnswer, deadline_s: float) -> None:
    _send(connection, [memoryview(_ANSWER.pack(*answer))], deadline_s)


def receive_answer(connection: socket.socket, deadline_s: float) -> KVAnswer:
    received = bytearray(_ANSWER.size)
    _receive(connection, [memoryview(received)], deadline_s)
    return KVAnswer(*_ANSWER.unpack(received))


def send_layers(connection: socket.socket, layers: Layers, deadline_s: float) -> None:
    """Straight from where they lie. Deadlines are on the monotonic clock; OSError (TimeoutError too) when it comes to nothing."""
    for views in layers:
        _send(connection, views, deadline_s)


def receive_layers(connection: socket.socket, layers: Layers, deadline_s: float) -> None:
    """Straight to where they are to lie."""
    for views in layers:
        _receive(connection, views, deadline_s)


def _send(connection: socket.socket, views: list[memoryview], deadline_s: float) -> None:
    for rest in _groups(views):
        while rest:
            _await(connection, deadline_s)
            rest = unsent(rest, connection.sendmsg(rest))


def _receive(connection: socket.socket, views: list[memoryview], deadline_s: float) -> None:
    for rest in _groups(views):
        while rest:
            _await(connection, deadline_s)
            count = connection.recvmsg_into(rest)[0]
            if not count:
                raise ConnectionError("it hung up")
            rest = unsent(rest, count)


def _groups(views: list[memoryview]) -> Iterable[list[memoryview]]:
    return (views[first : first + _MOST_VIEWS] for first in range(0, len(views), _MOST_VIEWS))


def _await(connection: socket.socket, deadline_s: float) -> None:
    left_s = deadline_s - monotonic()
    if left_s <= 0:
        raise TimeoutError("it took too long")
    connection.settimeout(left_s)
