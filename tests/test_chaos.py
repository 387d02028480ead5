"""The chaos harness: its schedule, its clients' judgement, its figures; and a storm, short and in full."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from benchmarks.chaos.clients import Ask, Clients, asks, undisturbed
from benchmarks.chaos.processes import Held, leaks
from benchmarks.chaos.run import unexcused
from benchmarks.chaos.schedule import WEIGHTS, Fault, Shape, Victim, faults
from benchmarks.chaos.stalls import spread, stall_s
from benchmarks.chaos.storm import Struck
from benchmarks.chaos.watch import Seen, repaired_s

TOKENS = [5, 6, 7]
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
ERROR = b'data: {"error": {"message": "no attention actor"}}\n\n'


def event(token: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": [token]}]}).encode() + b"\n\n"


WHOLE = HEAD + b"".join(map(event, TOKENS)) + DONE


# --- the schedule -----------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_faults_again() -> None:
    assert list(faults(3, 20, 5)) == list(faults(3, 20, 5)) != list(faults(4, 20, 5))


def test_so_many_of_each_way_come_and_every_victim_early() -> None:
    drawn = list(faults(0, 20, 6))
    assert Counter(fault.how for fault in drawn) == {"kill": 20, "pause": 6}
    assert {fault.victim for fault in drawn[: len(WEIGHTS)]} == set(WEIGHTS)


def test_many_faults_come_by_weight_at_every_moment() -> None:
    drawn = list(faults(0, 600))
    counts = Counter(fault.victim for fault in drawn)
    assert all(abs(counts[victim] / 600 - weight) < 0.08 for victim, weight in WEIGHTS.items())
    assert len({fault.moment for fault in drawn}) == 10


def test_only_chosen_victims_are_struck() -> None:
    assert {fault.victim for fault in faults(1, 30, victims=["ffn", "proxy"])} == {"ffn", "proxy"}


# --- its clients --------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def server(*answers: bytes | None) -> AsyncIterator[str]:
    """Gives one answer to each request, in turn, and the last one from then on; None: silence."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split()[1]) for line in head.splitlines() if line.startswith(b"Content-Length"))
        await reader.readexactly(length)
        answer = left.pop(0) if len(left) > 1 else left[0]
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
            await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        await listening.wait_closed()


async def heard(*answers: bytes | None, hung_after_s: float = 20.0) -> Clients:
    """One client, until something has gone wrong and an answer after it was right."""
    async with server(*answers, WHOLE) as url:
        clients = Clients(url, "m", [Ask((1,), len(TOKENS), {})], [TOKENS], hung_after_s, pause_s=0.0)
        clients.start()
        async with asyncio.timeout(20):
            while not (clients.mishaps and clients.answered):
                await asyncio.sleep(0)
        await clients.stop()
        return clients


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (HEAD + event(5) + event(8) + DONE, "wrong", "token 1 is 8, not [6]"),
        (HEAD + event(5) + event(6) + DONE, "wrong", "2 tokens of 3"),
        (HEAD + b"".join(map(event, [*TOKENS, 7])) + DONE, "wrong", "token 3 is 7, not []"),
        (HEAD + event(5) + ERROR + DONE, "retryable", "no attention actor"),
        (HEAD + event(5), "retryable", "closed the connection before"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "retryable", "answered 503"),
        (b"", "retryable", "closed the connection before"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "failed", "answered 400"),
    ],
    ids=["changed", "lost", "repeated", "error event", "broken", "503", "reset", "400"],
)
async def test_a_client_tells_what_was_wrong_and_asks_again(answer: bytes, kind: str, said: str) -> None:
    (mishap,) = (await heard(answer)).mishaps
    assert (mishap.kind, said in mishap.what) == (kind, True)


async def test_a_client_that_hears_nothing_is_hung() -> None:
    assert (await heard(None, hung_after_s=0.05)).mishaps[0].kind == "hung"


async def test_the_undisturbed_answers_are_those_of_the_server() -> None:
    async with server(WHOLE) as url:
        assert await undisturbed(url, "m", asks(0, 4, 512, 3)) == 4 * [TOKENS]


def test_half_the_clients_sample_with_a_seed_and_some_prompts_are_long() -> None:
    made = asks(0, 8, 512, 3)
    assert [("seed" in ask.sampling) for ask in made] == 4 * [False, True]
    assert sum(len(ask.prompt) >= 300 for ask in made) == 2


# --- its figures --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("5 ready", "5 recovering, 6 recovering, 7 ready", 1.0),
        ("5 resizing", "6 resizing, 6 ready, 6 recovering, 8 recovering", 3.0),  # a death just after a switch
        ("5 resizing", "5 recovering, 5 ready, 5 resizing, 7 resizing", 1.0),  # a new controller rolls back
        ("5 recovering", "7 recovering, 8 ready", 0.0),
        ("6 resizing", "6 ready, 6 resizing, 7 resizing", None),  # who had no part any more has died; then another resize
        ("6 ready", "6 resizing, 7 resizing", None),
        ("6 ready", "", None),
    ],
)
def test_a_fault_is_recovered_from_in_a_later_epoch_than_it_broke(before: str, after: str, expected: float | None) -> None:
    def seen(at_s: float, text: str) -> Seen:
        epoch, state = text.split()
        return Seen(at_s, int(epoch), state)

    heard = [seen(float(i), text) for i, text in enumerate(after.split(", ")) if text]
    assert repaired_s(seen(-1.0, before), heard) == expected


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        ([0.0, 1.0, 2.1, 2.9, 3.0], 0.9),
        ([0.0, 1.0, 2.01, 4.0, 4.1], 2.0),
        ([0.0, 1.0, 2.5, 4.0, 9.0], 2.0),
        ([0.0, 1.0, 1.9], None),
    ],
    ids=["by the next token", "after tokens on their way", "a later gap is another's", "over before"],
)
def test_a_stall_lasts_from_the_fault_to_the_end_of_the_gap(times_s: Sequence[float], expected: float | None) -> None:
    found = stall_s(times_s, struck_s=2.0, repaired_s=3.0)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_spread_of_few_and_of_none() -> None:
    assert spread([]) == {}
    assert spread([2.0]) == {"p50": 2.0, "p95": 2.0, "max": 2.0}
    assert spread(range(101)) == {"p50": 50, "p95": 95, "max": 100}


async def test_only_a_death_in_front_of_the_cluster_excuses_an_error() -> None:
    lost = await heard(HEAD + event(5))
    changed = await heard(HEAD + event(8) + DONE)

    def struck(victim: Victim, clients: Clients) -> Struck:
        fault = Fault(victim, "kill", "serving", 0.0, 0.0, 0.0, Shape(1, 1, 1))
        return Struck(fault, True, None, [], 0.0, clients.mishaps)

    assert unexcused(lost.mishaps, [struck("ingress", lost)]) == []
    assert unexcused(lost.mishaps, [struck("ffn", lost)]) == lost.mishaps
    assert unexcused(changed.mishaps, [struck("ingress", changed)]) == changed.mishaps


def test_what_there_is_more_of_is_a_leak() -> None:
    before = Held({"ffn": 2}, 5, 4, 12, {"ffn": 100}, {"ffn": 60})
    assert leaks(before, before._replace(descriptors={"ffn": 108})) == []
    after = Held({"ffn": 3}, 5, 5, 12, {"ffn": 109}, {"ffn": 60})
    assert leaks(before, after) == [
        "processes: {'ffn': 3}, were {'ffn': 2}",
        "placement_groups: 5, were 4",
        "descriptors of ffn: 109, were 100",
    ]


# --- the storm ----------------------------------------------------------------------------------------------------------------------

SHORT = ["--kills", "3", "--clients", "6", "--tokens", "50", "--detect-timeout", "10", "--victims", "attention", "ffn", "ingress"]
FULL = ["--kills", "100", "--pauses", "20", "--detect-timeout", "3"]


def benchmark(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.ray
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arguments", [pytest.param(SHORT, id="short"), pytest.param(FULL, id="full", marks=pytest.mark.full)])
def test_no_client_loses_a_token_and_nothing_is_left(arguments: list[str]) -> None:
    done = benchmark("chaos", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] >= int(arguments[1])
    assert (said["unexcused"], said["left"], said["end"]) == ([], [], None)


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_twenty_resizes_in_a_row_change_no_token() -> None:
    done = benchmark("resize", "--detect-timeout", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert [row["outcome"] for row in said["rows"]] == 20 * ["committed"]
    assert said["mishaps"] == []
