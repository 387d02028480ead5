"""Clients that go away at random points leave nothing behind in the live server."""

import asyncio
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from tests.live_server import DEADLINE_S, LiveServer, until

pytestmark = pytest.mark.ray

CONCURRENCY = 64
LEAVING = 0.1
MAX_TOKENS = 24
FAR = 1800
"""Tokens that nobody waits for: so long a request is only over in time when it is given up."""
RELEASED_WITHIN_S = 15.0
OPENED_BY_RAY = 4
"""Files that Ray may open by itself meanwhile; far fewer than there are clients that leave."""
PROMPTS = ("Ben has", "What is 12 plus 7?", "Sort these words: pear fig plum", "Anna went to the park. " * 8)


class Visit(NamedTuple):
    """One client: what it asks, and where it leaves."""

    body: dict[str, Any]
    leaves: str | None = None
    """None: it stays. Or: in the body (half of it sent), before the answer, in the answer (after `events` events)."""
    events: int = 0
    abruptly: bool = False
    """With a reset instead of a goodbye."""


def visits(count: int, rng: random.Random) -> list[Visit]:
    def visit(leaves: bool) -> Visit:
        stream = rng.random() < 0.7
        body = {"prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(1, MAX_TOKENS), "ignore_eos": True, "stream": stream}
        body |= {"n": rng.choice((1, 1, 1, 2)), "seed": rng.getrandbits(32)}
        if not leaves:
            return Visit(body)
        body["max_tokens"] = FAR
        where = rng.choice(
            ("in the body", "before the answer", "in the answer") if stream else ("in the body", "before the answer")
        )
        return Visit(body, where, rng.randint(1, MAX_TOKENS), rng.random() < 0.5)

    leaving = [i < count * LEAVING for i in range(count)]
    rng.shuffle(leaving)
    return [visit(leaves) for leaves in leaving]


async def make(visit: Visit, host: str, port: int) -> str:
    """How the visit ended."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        content = json.dumps(visit.body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        sent = content[: len(content) // 2] if visit.leaves == "in the body" else content
        writer.write(head.encode() + sent)
        await writer.drain()
        if visit.leaves == "in the answer":
            for _ in range(visit.events):
                await reader.readuntil(b"data: ")
        if visit.leaves is None:
            return judge(visit, await reader.read())
        return visit.leaves
    finally:
        if visit.abruptly:
            writer.transport.abort()
        writer.close()


def judge(visit: Visit, answer: bytes) -> str:
    whole = answer.startswith(b"HTTP/1.1 200") and (not visit.body["stream"] or b"data: [DONE]" in answer)
    return "answered" if whole and b'"error"' not in answer else answer.decode()


async def make_all(all_visits: list[Visit], url: str) -> Counter[str]:
    address = urlsplit(url)
    room = asyncio.Semaphore(CONCURRENCY)

    async def one(visit: Visit) -> str:
        async with room:
            return await asyncio.wait_for(make(visit, address.hostname or "", address.port or 0), DEADLINE_S)

    return Counter(await asyncio.gather(*map(one, all_visits)))


def open_files(live: LiveServer) -> dict[int, int]:
    """Of the ingress and of each attention actor, by process id."""
    attention = {actor["pid"] for actor in live.status()["attention"]}
    processes = [p for p in live.processes() if p.pid in attention or "ServeReplica" in " ".join(p.cmdline())]
    assert len(processes) == len(attention) + 1
    return {process.pid: process.num_fds() for process in processes}


def integrity(live: LiveServer) -> str:
    """What the controller finds wrong: `[]` when nothing."""
    code = (
        "import sys; from actors.commands.joining import use_token; use_token(); from actors.serve import ask_controller;"
        "print(ask_controller(sys.argv[1], '/admin/check_integrity', None, 60))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, live.ray_address], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    return done.stdout.strip() or done.stderr


def nothing_left(live: LiveServer, tasks: float, files: dict[int, int]) -> Callable[[], bool]:
    def holds() -> bool:
        # The scrape itself is a request in flight, and a task.
        quiet = live.metric("afd_http_requests_in_flight") == 1 and live.metric("afd_ingress_tasks") <= tasks
        now = open_files(live)
        return live.idle() and quiet and all(now[pid] <= count + OPENED_BY_RAY for pid, count in files.items())

    return holds


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_clients_that_go_away_leave_nothing_behind(live: LiveServer, count: int) -> None:
    rng = random.Random(2)
    asyncio.run(make_all(visits(64, rng), live.url))  # what is set up once is set up now
    until(live.idle)
    until(lambda: live.metric("afd_http_requests_in_flight") == 1)
    tasks, files = live.metric("afd_ingress_tasks"), open_files(live)
    made = visits(count, rng)
    ends = asyncio.run(make_all(made, live.url))
    assert ends == Counter(visit.leaves or "answered" for visit in made)
    assert len(ends) == 4
    until(nothing_left(live, tasks, files), RELEASED_WITHIN_S)
    assert integrity(live) == "[]"
    assert asyncio.run(make_all([Visit({"prompt": "Ben has", "stream": True})], live.url)) == Counter(["answered"])
