"""The heartbeat between a controller and an actor: felt by who knows the secret, over when the actor is."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from actors.pulse import Pulse, PulseServer

SECRET = b"known to both"
HOST = "127.0.0.1"
TIMEOUT_S = 10.0


class Actor:
    def __init__(self) -> None:
        self.beats = 0
        self.server = PulseServer(SECRET, self.heard)

    def heard(self) -> None:
        self.beats += 1


@pytest.fixture
async def actor() -> AsyncIterator[Actor]:
    made = Actor()
    await made.server.start(HOST)
    yield made
    made.server.close()


async def test_every_beat_is_answered(actor: Actor) -> None:
    port = await actor.server.start(HOST)
    assert await actor.server.start(HOST) == port
    pulse = await Pulse.open(HOST, port, SECRET)
    async with asyncio.timeout(TIMEOUT_S):
        for _ in range(3):
            await pulse.beat()
    assert actor.beats >= 3
    pulse.close()
    with pytest.raises(ConnectionError):
        await pulse.beat()


async def test_a_stranger_is_hung_up_on(actor: Actor) -> None:
    pulse = await Pulse.open(HOST, await actor.server.start(HOST), b"guessed")
    with pytest.raises(ConnectionError):
        async with asyncio.timeout(TIMEOUT_S):
            await pulse.beat()
    assert actor.beats == 0


async def test_nobody_is_there() -> None:
    made = Actor()
    port = await made.server.start(HOST)
    made.server.close()
    with pytest.raises(OSError, match="Connect"):
        await Pulse.open(HOST, port, SECRET)
