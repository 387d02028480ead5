"""Keys and values from one cache to another over a real connection: exactly those, to nobody else, and never waited for without end."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch

from afd_ray.engine.kv_cache import PagedCache
from afd_ray.handoff import kv_fetcher
from afd_ray.handoff.kv_fetcher import KVFetcher
from afd_ray.handoff.kv_server import KVServer, Lot
from afd_ray.handoff.kv_wire import KVAnswer, KVOrder, kv_digest
from afd_ray.request import KVTicket
from tests.engine_cache import TINY, CacheSize, cache_of, content, fill

HOST, SECRET, KEY, DIGEST = "127.0.0.1", b"the cluster's", b"0123456789abcdef", 7
TIMEOUT_S = 20.0
TOKENS = 29


class Leaver:
    """Has one request's keys and values under KEY."""

    def __init__(self, cache: PagedCache, block_table: list[int]) -> None:
        self.cache, self.block_table = cache, block_table
        self.let_go: list[bytes] = []
        self.gone = threading.Event()
        self.before_lending: Callable[[], object] = lambda: None
        self.server = KVServer(HOST, SECRET, DIGEST, self.lend, self.forget)

    @property
    def ticket(self) -> KVTicket:
        return KVTicket(self.server.address, KEY, TOKENS, TOKENS * self.cache.token_bytes)

    def lend(self, order: KVOrder) -> Lot | None:
        self.before_lending()
        if order.key != KEY or order.positions > TOKENS or self.let_go:
            return None
        answer = KVAnswer(order.positions, order.positions * self.cache.token_bytes)
        return Lot(answer, self.cache.outgoing(self.block_table, order.positions))

    def forget(self, key: bytes) -> None:
        self.let_go.append(key)
        self.gone.set()


@pytest.fixture
def leaver() -> Iterator[Leaver]:
    made = leaver_of()
    yield made
    made.server.close()


def leaver_of(size: CacheSize = TINY) -> Leaver:
    cache, blocks = cache_of(size), [7, 8, 2, 3, 4, 12, 0, 19]
    fill(cache, blocks, TOKENS)
    return Leaver(cache, blocks)


class Taker:
    """A cache of its own, whose blocks are of another size and elsewhere."""

    def __init__(self, size: CacheSize = TINY, secret: bytes = SECRET, digest: int = DIGEST) -> None:
        self.cache = cache_of(size._replace(block_size=5, num_blocks=12))
        self.block_table = [11, 3, 4, 5, 0, 9]
        self.fetcher = KVFetcher(HOST, secret, digest)
        self.ended = threading.Event()
        self.failures: list[str] = []

    def fetch(self, ticket: KVTicket, positions: int = TOKENS) -> str:
        """Why it failed; empty: it did not."""
        self.begin(ticket, positions)
        assert self.ended.wait(TIMEOUT_S)
        return self.failures[-1]

    def begin(self, ticket: KVTicket, positions: int = TOKENS) -> None:
        self.ended.clear()
        layers = self.cache.incoming(self.block_table, positions)
        self.fetcher.fetch(ticket, positions, positions * self.cache.token_bytes, layers, self.done)

    def done(self, duration_s: float, failure: str) -> None:
        self.failures.append(failure)
        self.ended.set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 5, 28, TOKENS])
def test_what_arrives_is_bit_for_bit_what_was_there_and_nothing_else_changes(dtype: torch.dtype, positions: int) -> None:
    size = TINY._replace(dtype=dtype)
    leaver, taker = leaver_of(size), Taker(size)
    before = leaver.cache.blocks.clone()
    assert taker.fetch(leaver.ticket, positions) == ""
    leaver.server.close()
    expected = content(leaver.cache, leaver.block_table, positions)
    assert expected.all()
    assert torch.equal(content(taker.cache, taker.block_table, positions), expected)
    assert int((taker.cache.blocks != 0).any(-1).sum()) == size.layers * positions
    assert torch.equal(leaver.cache.blocks, before)
    assert leaver.let_go == [KEY]


def test_several_come_over_one_connection_in_turn(leaver: Leaver) -> None:
    taker, ended = Taker(), threading.Semaphore(0)
    leaver.server._let_go = lambda key: None
    leaver.before_lending = ended.acquire
    for _ in range(5):
        taker.begin(leaver.ticket)
    assert taker.fetcher.expected_s(leaver.ticket, 0) > 5 * leaver.ticket.size_bytes / 1e8
    for _ in range(5):
        ended.release()
    while len(taker.failures) < 5:
        assert taker.ended.wait(TIMEOUT_S)
        taker.ended.clear()
    assert taker.failures == [""] * 5
    assert taker.fetcher._queued_bytes == 0


def test_bytes_of_many_layers_do_not_fit_the_kernel_at_once() -> None:
    size = CacheSize(layers=2, num_blocks=3000, block_size=16, head_dim=64)
    leaver, taker = leaver_of(size), Taker(size)
    leaver.block_table, taker.cache = list(range(2999, 0, -1)), cache_of(size)
    taker.block_table = [*range(0, 3000, 2), *range(1, 3000, 2)]
    tokens = 40_000
    fill(leaver.cache, leaver.block_table, tokens)
    leaver.lend = lambda order: Lot(  # type: ignore[method-assign]
        KVAnswer(tokens, tokens * leaver.cache.token_bytes), leaver.cache.spans(leaver.block_table, tokens)
    )
    leaver.server._lend = leaver.lend
    assert taker.fetch(leaver.ticket, tokens) == ""
    leaver.server.close()
    assert torch.equal(content(taker.cache, taker.block_table, tokens), content(leaver.cache, leaver.block_table, tokens))


def test_a_request_can_be_had_once(leaver: Leaver) -> None:
    taker = Taker()
    assert taker.fetch(leaver.ticket) == ""
    assert leaver.gone.wait(TIMEOUT_S)
    assert "0 positions in 0 bytes are there" in taker.fetch(leaver.ticket)


@pytest.mark.parametrize(
    ("secret", "digest", "key", "positions", "reason"),
    [
        (b"another", DIGEST, KEY, TOKENS, "handshake"),
        (SECRET, DIGEST + 1, KEY, TOKENS, "contract digest is"),
        (SECRET, DIGEST, b"f" * 16, TOKENS, "not what was promised"),
        (SECRET, DIGEST, KEY, TOKENS + 1, "not what was promised"),
    ],
)
def test_strangers_and_mismatches_are_refused(
    leaver: Leaver, secret: bytes, digest: int, key: bytes, positions: int, reason: str
) -> None:
    taker = Taker(secret=secret, digest=digest)
    assert reason in taker.fetch(leaver.ticket._replace(key=key), positions)
    assert not taker.cache.blocks.any()
    assert leaver.let_go == []


def test_an_order_without_proof_gets_nothing(leaver: Leaver) -> None:
    host, _, port = leaver.server.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as stranger:
        stranger.sendall(KEY + b"\x1d\0\0\0" + bytes(200))
        received = b""
        with suppress(ConnectionError):
            while part := stranger.recv(1 << 16):
                received += part
    assert len(received) < 100, "the challenge"
    assert leaver.let_go == []


def test_what_is_not_wanted_is_let_go_of(leaver: Leaver) -> None:
    Taker().fetcher.give_back(leaver.ticket)
    assert leaver.gone.wait(TIMEOUT_S)
    assert leaver.let_go == [KEY]


def test_a_leaver_that_is_gone_fails_the_fetch_at_once(leaver: Leaver) -> None:
    leaver.server.close()
    assert "cannot be reached" in Taker().fetch(leaver.ticket)


def test_a_leaver_that_ends_half_way_fails_the_fetch(leaver: Leaver) -> None:
    taker = Taker()

    def half() -> Iterator[list[memoryview]]:
        yield next(leaver.cache.spans(leaver.block_table, TOKENS))
        raise ConnectionError("planted")

    answer = KVAnswer(TOKENS, TOKENS * leaver.cache.token_bytes)
    leaver.server._lend = lambda order: Lot(answer, half())
    assert taker.fetch(leaver.ticket) == "it hung up"
    assert leaver.gone.wait(TIMEOUT_S)


def test_a_leaver_that_does_not_answer_is_waited_for_no_longer_than_expected(
    leaver: Leaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_fetcher, "LATE_S", 0.05)
    answering = threading.Event()
    leaver.before_lending = lambda: answering.wait(TIMEOUT_S)
    taker, started_s = Taker(), time.monotonic()
    taker.begin(leaver.ticket)
    assert time.monotonic() - started_s < TIMEOUT_S, "who asks does not wait"
    assert taker.ended.wait(TIMEOUT_S)
    assert taker.failures == ["timed out"]
    answering.set()
    assert leaver.gone.wait(TIMEOUT_S), "what was lent is let go of though nobody took it"


def test_nothing_runs_once_all_is_fetched(leaver: Leaver) -> None:
    taker = Taker()
    assert taker.fetch(leaver.ticket) == ""
    for thread in [thread for thread in threading.enumerate() if thread.name == "kv-fetcher"]:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    leaver.server.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "kv-server"]


def test_the_digest_tells_apart_what_does_not_fit() -> None:
    one = kv_digest(1, 4, 64, torch.bfloat16)
    assert one == kv_digest(1, 4, 64, torch.bfloat16)
    others = [kv_digest(2, 4, 64, torch.bfloat16), kv_digest(1, 5, 64, torch.bfloat16), kv_digest(1, 4, 64, torch.float32)]
    assert len({one, *others}) == 4
