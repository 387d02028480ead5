"""Ten thousand malformed frames at the ports that actors have: refused, counted in the log, and forgotten; who belongs there is let in."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import grpc
import psutil
import pytest

from actors.pulse import PROOF_BYTES, Pulse, PulseServer
from actors.request_log import requests
from actors.token_client import TokenStreamClient
from actors.token_frames import Submit, encode_order
from actors.token_server import TokenStreamServer
from actors.token_stream import METHOD, SECRET_KEY, SERVICE
from afd_ray.handoff import handshake
from afd_ray.handoff.gate import dial
from afd_ray.handoff.handshake import Carrier, Claim
from afd_ray.handoff.kv_server import KVServer
from afd_ray.handoff.kv_wire import KV_EPOCH
from afd_ray.handoff.mesh import open_mesh
from afd_ray.refusals import PERIOD_S, TOLD_IN_A_PERIOD, RefusalLog
from afd_ray.request import Request
from tests.strangers import damaged, knock, near_hello, noise

HOST, SECRET, DIGEST = "127.0.0.1", b"known to the members", 7
FRAMES = 2500
"""At each of four listeners."""
ROOM_BYTES = 16 << 20
"""How much larger this process may be afterwards: what is kept of each frame may be 1.6 KiB at most."""
TIMEOUT_S = 20.0

Listener = Callable[[], AbstractContextManager[int]]


@pytest.fixture
def unmoved(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """However many come, the log has few lines of it, and no traceback; the process does not grow."""
    caplog.set_level(logging.INFO)
    before_bytes = psutil.Process().memory_info().rss
    yield
    records = [record for record in caplog.get_records("call") if record.name != requests.name]
    assert 0 < len(records) <= TOLD_IN_A_PERIOD
    assert not any(record.exc_info for record in records)
    assert psutil.Process().memory_info().rss - before_bytes < ROOM_BYTES


@contextmanager
def a_link() -> Iterator[int]:
    member = open_mesh(0, 2, KV_EPOCH, secret=SECRET, host=HOST, peers={1: 1 << 16}, kind="tcp", digest=DIGEST)
    yield member.endpoint.port
    member.close()


@contextmanager
def kv_server() -> Iterator[int]:
    server = KVServer(HOST, SECRET, DIGEST, lambda order: None, lambda key: None)
    yield int(server.address.rpartition(":")[2])
    server.close()


@pytest.mark.parametrize("listener", [a_link, kv_server])
def test_a_gate_lets_nobody_in_but_a_peer(unmoved: None, listener: Listener) -> None:
    rng = random.Random(1)

    def says(challenge: bytes) -> bytes:
        return noise(rng) if rng.random() < 0.5 else near_hello(rng, SECRET, challenge)

    with listener() as port:
        for _ in range(FRAMES):
            knock((HOST, port), says, hears_bytes=handshake.CHALLENGE_BYTES, rng=rng)
        peer = Claim(Carrier.TCP, 1, 0, KV_EPOCH, DIGEST, rng.randbytes(handshake.NONCE_BYTES))
        dial(HOST, port, source_host=HOST, secret=SECRET, claim=peer, deadline_s=time.monotonic() + TIMEOUT_S).close()


async def test_a_heartbeat_is_answered_to_the_controller_alone(unmoved: None) -> None:
    rng, beats = random.Random(2), []
    server = PulseServer(SECRET, lambda: beats.append(1))
    port = await server.start(HOST)

    def proofs(_heard: bytes) -> bytes:
        return rng.choice((noise(rng), rng.randbytes(PROOF_BYTES), rng.randbytes(rng.randrange(PROOF_BYTES))))

    await asyncio.to_thread(lambda: [knock((HOST, port), proofs, rng=rng) for _ in range(FRAMES)])
    assert beats == []
    pulse = await Pulse.open(HOST, port, SECRET)
    async with asyncio.timeout(TIMEOUT_S):
        await pulse.beat()
    pulse.close()
    server.close()


async def test_a_token_stream_takes_no_order_from_a_stranger(unmoved: None) -> None:
    rng, submitted = random.Random(3), []
    server = TokenStreamServer(lambda *order: submitted.append(order), lambda request_id: None, secret=SECRET, host=HOST)
    port = await server.start()
    await asyncio.to_thread(lambda: [knock((HOST, port), lambda _: noise(rng), rng=rng) for _ in range(FRAMES - 500)])
    order = encode_order(Submit(Request("stolen", (1, 2))))
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        for _ in range(500):
            await _order_without_the_secret(channel, rng, damaged(rng, order) if rng.random() < 0.5 else order)
    assert (submitted, server.streams) == ([], 0)
    client = await TokenStreamClient.connect(f"{HOST}:{port}", secret=SECRET, ingress_id="one of us")
    client.submit(Request("ours", (1, 2)))
    async with asyncio.timeout(TIMEOUT_S):
        while not submitted:
            await asyncio.sleep(0)
    await client.close()
    await server.close()


async def _order_without_the_secret(channel: grpc.aio.Channel, rng: random.Random, order: bytes) -> None:
    guess = rng.choice((b"", rng.randbytes(len(SECRET)), damaged(rng, SECRET), SECRET[:-1]))
    call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=((SECRET_KEY, guess),))
    with suppress(
        grpc.aio.AioRpcError, asyncio.InvalidStateError
    ):  # it may be over before the order is sent, which gRPC's client calls an internal error
        await call.write(order)
    assert await call.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL)


def test_refusals_are_counted_once_there_are_many(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    log = RefusalLog(logging.getLogger(__name__), lambda: now_s)
    for _ in range(1000):
        log.add("10.0.0.9:1", "it does not know the cluster secret")
    assert len(caplog.records) == TOLD_IN_A_PERIOD
    now_s = PERIOD_S
    log.add("10.0.0.9:1", "it left")
    assert [record.getMessage() for record in caplog.records[TOLD_IN_A_PERIOD:]] == [
        f"refused {1000 - TOLD_IN_A_PERIOD} connections more before this",
        "refused a connection from 10.0.0.9:1: it left",
    ]
