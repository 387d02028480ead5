"""What somebody may send who does not belong there: bytes without sense, and bytes that are nearly right."""

import random
import socket
import struct
from collections.abc import Callable

from afd_ray.handoff import handshake
from afd_ray.handoff.handshake import Claim

TIMEOUT_S = 20.0
_RESET = struct.pack("ii", 1, 0)
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def noise(rng: random.Random) -> bytes:
    """Without sense, or of another protocol."""
    most = rng.choice((0, 1, 40, 200, 4000))
    return rng.choice((b"", b"GET / HTTP/1.1\r\n\r\n", _HTTP2, b"\x00" * 64, b"\xff" * 64)) + rng.randbytes(rng.randint(0, most))


def near_hello(rng: random.Random, secret: bytes, challenge: bytes) -> bytes:
    """The hello of a peer, wrong in one way: too short, damaged, of another secret, for another challenge; or right, but its claim is not."""
    claim = Claim(*(rng.getrandbits(bits) for bits in (8, 32, 32, 64, 64)), rng.randbytes(handshake.NONCE_BYTES))
    hello = handshake.hello(secret, challenge, claim)
    match rng.randrange(5):
        case 0:
            return hello[: rng.randrange(len(hello))]
        case 1:
            return damaged(rng, hello)
        case 2:
            return handshake.hello(rng.randbytes(32), challenge, claim)
        case 3:
            return handshake.hello(secret, rng.randbytes(len(challenge)), claim)
    return hello + rng.randbytes(rng.randrange(200))


def damaged(rng: random.Random, right: bytes) -> bytes:
    """One to four bytes are others."""
    wrong = bytearray(right)
    for _ in range(rng.randint(1, 4)):
        wrong[rng.randrange(len(wrong))] ^= rng.randint(1, 255)
    return bytes(wrong)


def knock(address: tuple[str, int], says: Callable[[bytes], bytes], *, hears_bytes: int = 0, rng: random.Random) -> None:
    """Connect, hear so much, answer what `says` gives, and leave: in good order or with a reset, which leaves no port behind."""
    with socket.create_connection(address, TIMEOUT_S) as connection:
        heard = connection.recv(hears_bytes, socket.MSG_WAITALL) if hears_bytes else b""
        try:
            connection.sendall(says(heard))
            if rng.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1 << 10)
        except OSError:
            pass  # refused before it was over
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
