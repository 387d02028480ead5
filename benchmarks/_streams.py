"""Streaming completions over HTTP, with as little work for each event as a client on the same cores can do."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers.protocol import Answer, EngineError, Job

EVENT, DONE = b"data: ", b"data: [DONE]"
LIMIT_BYTES = 1 << 20


def stream_all(url: str, model: str, job: Job) -> Answer:
    """Every prompt of the job in a stream of its own, all at once. Raises EngineError (one line) for an answer other than 200."""
    return asyncio.run(_stream_all(url, model, job))


async def _stream_all(url: str, model: str, job: Job) -> Answer:
    started_s = time.perf_counter()
    events = await asyncio.gather(*(_events(url, body(model, prompt, job.max_tokens)) for prompt in job.prompts))
    return Answer([token_times(of_one, started_s) for of_one in events])


def body(model: str, prompt: Sequence[int], max_tokens: int, **sampling: Any) -> bytes:
    """Greedy, unless `sampling` says otherwise; exactly `max_tokens`."""
    fields = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
    return json.dumps(fields | {"ignore_eos": True, "stream": True, "return_token_ids": True} | sampling).encode()


def token_times(events: Sequence[tuple[float, bytes]], started_s: float) -> list[float]:
    """When each token came: an event may carry several, or none."""
    times: list[float] = []
    for at_s, line in events:
        for choice in json.loads(line)["choices"]:
            times += [at_s - started_s] * len(choice.get("token_ids") or ())
    return times


async def _events(url: str, content: bytes) -> list[tuple[float, bytes]]:
    """The data lines of one answer with their times of arrival; they are read when all is over."""
    return [(time.perf_counter(), line) async for line in data_lines(url, content)]


class Refused(EngineError):
    """Another answer than 200."""

    def __init__(self, url: str, status: int) -> None:
        super().__init__(f"{url} answered {status}")
        self.status = status


class Broken(EngineError):
    """The connection ended before the answer was over."""


async def data_lines(url: str, content: bytes) -> AsyncIterator[bytes]:
    """The data of each event of one streamed completion, as it comes.

    Raises Refused, Broken, and OSError when nobody listens.
    """
    server = urlsplit(url)
    reader, writer = await asyncio.open_connection(server.hostname, server.port, limit=LIMIT_BYTES)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        status = (await reader.readline()).split(maxsplit=2)
        if len(status) > 1 and status[1] != b"200":
            raise Refused(url, int(status[1]))
        while not (line := await reader.readline()).startswith(DONE):
            if not line:
                raise Broken(f"{url} closed the connection before the answer was over")
            if line.startswith(EVENT):
                yield line.removeprefix(EVENT)
    except ConnectionError as error:
        raise Broken(f"{url}: {error}") from None
    finally:
        writer.close()
