"""How two members prove that they share the cluster's secret and a contract, before an edge carries anything."""

import hmac
import struct
from enum import IntEnum
from hashlib import sha256
from typing import NamedTuple

PROTOCOL = b"afd-link"
VERSION = 1
NONCE_BYTES = 32

_CHALLENGE = struct.Struct("<8sH32s")
_CLAIM = struct.Struct("<BIIQQ32s")
_VERDICT = struct.Struct("<BQQ")
_MAC_BYTES = sha256().digest_size

CHALLENGE_BYTES = _CHALLENGE.size
HELLO_BYTES = _CLAIM.size + _MAC_BYTES
WELCOME_BYTES = _VERDICT.size + _MAC_BYTES


class Carrier(IntEnum):
    """What carries the edge's messages; the connection itself shows that the peer lives."""

    SHM = 1
    TCP = 2
    GLOO = 3


class Verdict(IntEnum):
    """What the receiving side says to a peer that has proved itself."""

    WELCOME = 0
    EPOCH = 1
    DIGEST = 2
    RANK = 3


class Claim(NamedTuple):
    """Who dials, whom it means to reach, and under which contract."""

    carrier: int
    source: int
    target: int
    epoch: int
    digest: int
    nonce: bytes


def challenge(nonce: bytes) -> bytes:
    """The first bytes on a connection, from the side that was dialled."""
    return _CHALLENGE.pack(PROTOCOL, VERSION, nonce)


def check_challenge(received: bytes) -> None:
    protocol, version, _ = _CHALLENGE.unpack(received)
    if protocol != PROTOCOL:
        raise ValueError("what answers there is not a member of a group")
    if version != VERSION:
        raise ValueError(f"link version is {version} there, {VERSION} here")


def hello(secret: bytes, received_challenge: bytes, claim: Claim) -> bytes:
    body = _CLAIM.pack(*claim)
    return body + _mac(secret, b"hello", received_challenge, body)


def read_hello(secret: bytes, sent_challenge: bytes, received: bytes) -> Claim:
    """The claim of a peer that knows the secret; ValueError otherwise."""
    body, mac = received[: _CLAIM.size], received[_CLAIM.size :]
    if not hmac.compare_digest(mac, _mac(secret, b"hello", sent_challenge, body)):
        raise ValueError("it does not know the cluster secret")
    return Claim(*_CLAIM.unpack(body))


def judge(claim: Claim, *, rank: int, epoch: int, digest: int, expected: frozenset[int], carriers: frozenset[Carrier]) -> Verdict:
    """Whether a peer that has proved itself may join; `expected` are the ranks that have not connected yet."""
    if claim.epoch != epoch:
        return Verdict.EPOCH
    if claim.digest != digest:
        return Verdict.DIGEST
    return Verdict.WELCOME if claim.carrier in carriers and claim.target == rank and claim.source in expected else Verdict.RANK


def welcome(secret: bytes, received_hello: bytes, verdict: Verdict, epoch: int, digest: int) -> bytes:
    body = _VERDICT.pack(verdict, epoch, digest)
    return body + _mac(secret, b"welcome", received_hello, body)


def read_welcome(secret: bytes, sent_hello: bytes, received: bytes, claim: Claim) -> None:
    """ValueError, with one line, unless the other side knows the secret and lets this side in."""
    body, mac = received[: _VERDICT.size], received[_VERDICT.size :]
    if not hmac.compare_digest(mac, _mac(secret, b"welcome", sent_hello, body)):
        raise ValueError("it does not know the cluster secret")
    verdict, epoch, digest = _VERDICT.unpack(body)
    if verdict == Verdict.EPOCH:
        raise ValueError(f"epoch is {epoch} there, {claim.epoch} here")
    if verdict == Verdict.DIGEST:
        raise ValueError(digest_mismatch(digest, claim.digest))
    if verdict != Verdict.WELCOME:
        raise ValueError(f"it does not expect rank {claim.source}, or is not rank {claim.target}")


def digest_mismatch(theirs: int, ours: int) -> str:
    return f"contract digest is {theirs:016x} there, {ours:016x} here (another model, shard or version)"


def _mac(secret: bytes, label: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"\0".join((label, *parts)), "sha256")
