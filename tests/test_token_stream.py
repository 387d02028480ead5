"""The gRPC token stream between an attention actor and its ingress replicas, in one process."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from actors.token_client import Answers, StreamLost, TokenStreamClient
from actors.token_frames import Abort, Answer, Moved, Refused, Submit, decode_answers, decode_orders, encode_answers, encode_order
from actors.token_server import TokenStreamServer
from actors.token_stream import Lost, is_last
from afd_ray.request import KVTicket, Request, SamplingParams, TokenOutput

SECRET = b"s" * 32
TIMEOUT_S = 30


class Actor:
    """An attention actor's callbacks, recorded."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.generated: list[tuple[int, ...]] = []
        self.aborted: list[str] = []
        self.refusal: Exception | None = None
        self.changed = asyncio.Event()
        self.server = TokenStreamServer(self.submit, self.abort, secret=SECRET)
        self.address = ""

    def submit(self, request: Request, generated: tuple[int, ...], ticket: KVTicket | None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request.id)
        self.generated.append(generated)
        self.changed.set()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.changed.set()

    async def until(self, *, submitted: int = 0, aborted: int = 0) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.submitted) < submitted or len(self.aborted) < aborted:
                self.changed.clear()
                await self.changed.wait()

    async def connect(self, secret: bytes = SECRET) -> TokenStreamClient:
        return await TokenStreamClient.connect(self.address, secret=secret, ingress_id="test", timeout_s=TIMEOUT_S)


@pytest_asyncio.fixture
async def actor() -> AsyncIterator[Actor]:
    actor = Actor()
    actor.address = f"127.0.0.1:{await actor.server.start()}"
    yield actor
    await actor.server.close()


@pytest_asyncio.fixture
async def client(actor: Actor) -> AsyncIterator[TokenStreamClient]:
    client = await actor.connect()
    yield client
    await client.close()


def token(request_id: str, token_id: int, *, last: bool = False) -> TokenOutput:
    return TokenOutput(request_id, token_id, finish_reason="length" if last else None)


async def read(answers: Answers) -> list[Answer | Lost]:
    """Up to the last."""
    read: list[Answer | Lost] = []
    async with asyncio.timeout(TIMEOUT_S):
        while not read or not is_last(read[-1]):
            read.append(await answers.get())
    return read


async def collect(client: TokenStreamClient, request: Request, generated: tuple[int, ...] = ()) -> list[Answer | Lost]:
    return await read(client.submit(request, generated))


def token_ids(answers: list[Answer | Lost]) -> list[int | None]:
    return [answer.token_id for answer in answers if isinstance(answer, TokenOutput)]


def test_frames_keep_every_field() -> None:
    params = SamplingParams(
        max_tokens=None, temperature=0.25, seed=2**64 - 1, stop=("a", "\u00e9"), stop_token_ids=(3,), logprobs=2
    )
    orders: list[Submit | Abort] = [
        Submit(Request("r", (1, 2, 70000), params)),
        Submit(Request("r~2", (1, 2, 70000), params), (5, 6)),
        Abort("r"),
    ]
    assert decode_orders(b"".join(encode_order(order) for order in orders)) == orders
    answers: list[Answer] = [
        TokenOutput("r", 5, -0.5, ((5, -0.5), (6, float("-inf"))), "stop"),
        TokenOutput("r", None, error="x"),
        Refused("r", "no"),
        Moved("r"),
        Moved("r", "out of memory"),
        Moved("r", ticket=KVTicket("10.0.0.1:5", b"\0key", 12, 3456)),
    ]
    assert decode_answers(encode_answers(answers)) == answers


def test_an_order_out_of_range_is_refused_alone() -> None:
    good, bad = (
        encode_order(Submit(Request("a", (1,)))),
        encode_order(Submit(Request("b", (1,)))).replace(b"\xabtemperature\xcb?", b"\xabtemperature\xcb\xbf"),
    )
    decoded = decode_orders(bad + good)
    assert isinstance(decoded[0], Refused)
    assert "temperature" in decoded[0].reason
    assert decoded[1] == Submit(Request("a", (1,)))


async def test_tokens_reach_their_request_in_order(actor: Actor, client: TokenStreamClient) -> None:
    tasks = [asyncio.create_task(collect(client, Request(name, (1,)))) for name in ("a", "b")]
    await actor.until(submitted=2)
    steps = [[token("a", 1), token("b", 11)], [token("b", 12), token("a", 2, last=True)], [token("b", 13, last=True)]]

    def publish() -> None:
        for step in steps:
            actor.server.publish(step)

    publisher = threading.Thread(target=publish)
    publisher.start()
    first, second = await asyncio.gather(*tasks)
    publisher.join()
    assert token_ids(first) == [1, 2]
    assert token_ids(second) == [11, 12, 13]
    assert (actor.aborted, actor.server.requests, client.outstanding, client.outstanding_tokens) == ([], 0, 0, 0)


async def test_each_stream_gets_only_its_own(actor: Actor, client: TokenStreamClient) -> None:
    other = await actor.connect()
    mine, theirs = (
        asyncio.create_task(collect(client, Request("a", (1,)))),
        asyncio.create_task(collect(other, Request("b", (1,)))),
    )
    await actor.until(submitted=2)
    actor.server.publish([token("a", 1, last=True), token("b", 2, last=True), token("nobody", 3)])
    assert token_ids(await mine + await theirs) == [1, 2]
    await other.close()


async def test_what_is_said_after_an_abort_is_dropped(actor: Actor, client: TokenStreamClient) -> None:
    answers = client.submit(Request("a", (1,)))
    await actor.until(submitted=1)
    actor.server.publish([token("a", 1)])
    await answers.get()
    client.abort("a")
    await actor.until(aborted=1)
    actor.server.publish([token("a", 2)])  # a token already under way
    await collect_one(actor, client, "b")
    assert answers.empty()
    assert (actor.aborted, actor.server.requests, client.outstanding) == (["a"], 0, 0)


async def collect_one(actor: Actor, client: TokenStreamClient, name: str) -> None:
    running, before = asyncio.create_task(collect(client, Request(name, (1,)))), len(actor.submitted)
    await actor.until(submitted=before + 1)
    actor.server.publish([token(name, 1, last=True)])
    assert token_ids(await running) == [1]


async def test_a_refused_request_harms_no_other(actor: Actor, client: TokenStreamClient) -> None:
    running = asyncio.create_task(collect(client, Request("a", (1,))))
    await actor.until(submitted=1)
    actor.refusal = ValueError("prompt must fit the KV cache")
    assert await collect(client, Request("b", (1,))) == [Refused("b", "prompt must fit the KV cache")]
    actor.refusal = RuntimeError("planted")
    assert await collect(client, Request("c", (1,))) == [Moved("c", "the engine did not take the request: planted")]
    actor.server.publish([token("a", 1, last=True)])
    assert len(await running) == 1


async def test_a_late_refusal_ends_the_request(actor: Actor, client: TokenStreamClient) -> None:
    running = asyncio.create_task(collect(client, Request("a", (1,))))
    await actor.until(submitted=1)
    actor.server.refuse("a", "prompt must be shorter")
    assert await running == [Refused("a", "prompt must be shorter")]
    assert actor.server.requests == 0


async def test_requests_are_given_back(actor: Actor, client: TokenStreamClient) -> None:
    running = [asyncio.create_task(collect(client, Request(name, (1,)))) for name in ("a", "b", "c")]
    await actor.until(submitted=3)
    actor.server.move(["a", "nobody"])
    actor.server.publish([token("a", 1), token("b", 2)])  # what the step under way still brings of "a" is dropped
    assert await running[0] == [Moved("a")]
    assert actor.server.requests == 2
    actor.server.move_all("out of memory")
    assert await running[1] == [token("b", 2), Moved("b", "out of memory")]
    assert await running[2] == [Moved("c", "out of memory")]
    assert (actor.server.requests, client.outstanding, actor.aborted) == (0, 0, [])


async def test_a_request_goes_on_after_its_tokens(actor: Actor, client: TokenStreamClient) -> None:
    running = asyncio.create_task(collect(client, Request("a~2", (1,)), (7, 8)))
    await actor.until(submitted=1)
    assert (actor.submitted, actor.generated) == (["a~2"], [(7, 8)])
    actor.server.publish([token("a~2", 9, last=True)])
    assert token_ids(await running) == [9]


async def test_an_order_that_cannot_be_sent_harms_no_other(actor: Actor, client: TokenStreamClient) -> None:
    with pytest.raises(OverflowError):
        await collect(client, Request("a", (2**70,)))
    running = asyncio.create_task(collect(client, Request("b", (1,))))
    await actor.until(submitted=1)
    actor.server.publish([token("b", 1, last=True)])
    assert len(await running) == 1
    assert client.outstanding == 0


async def test_a_lost_client_has_its_requests_aborted(actor: Actor) -> None:
    client = await actor.connect()
    client.submit(Request("a", (1,)))
    client.submit(Request("b", (1,)))
    await actor.until(submitted=2)
    await client.close()
    await actor.until(aborted=2)
    assert sorted(actor.aborted) == ["a", "b"]
    assert (actor.server.requests, actor.server.streams) == (0, 0)


async def test_requests_on_a_broken_stream_are_lost(actor: Actor, client: TokenStreamClient) -> None:
    running = [asyncio.create_task(collect(client, Request(name, (1,)))) for name in ("a", "b")]
    await actor.until(submitted=2)
    await actor.server.close()
    reason = await asyncio.wait_for(client.broken(), TIMEOUT_S)
    assert actor.address in reason
    assert [await task for task in running] == [[Lost("a", reason)], [Lost("b", reason)]]
    assert await collect(client, Request("c", (1,))) == [Lost("c", reason)]
    await asyncio.wait_for(client.idle(), TIMEOUT_S)


async def test_the_wrong_secret_is_refused(actor: Actor) -> None:
    with pytest.raises(StreamLost, match="unauthenticated"):
        await actor.connect(secret=b"guess")
    assert actor.server.streams == 0


async def test_nobody_listening_is_said(actor: Actor) -> None:
    await actor.server.close()
    with pytest.raises(StreamLost, match=actor.address):
        await actor.connect()
