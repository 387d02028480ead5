"""What does the ingress add to the time to the first token? One client, HTTP streaming and the attention actor's own stream in turn.

Bound: an empty Ray Serve request; asked is less than 15 ms (p50) between the two.
"""

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections import deque
from collections.abc import Sequence
from datetime import date
from typing import Any

import httpx
import ray

from actors.cluster import Cluster
from actors.reporting import report
from actors.serve import Progress, await_ready, free_port, ingress, own_stdout, ray_cluster, stop_signals
from actors.token_client import TokenStreamClient
from actors.token_stream import is_last
from afd_ray.config import load_config
from afd_ray.demo.questions import fresh_questions
from afd_ray.request import Request, SamplingParams
from benchmarks._machine import hardware

ASKED_MS = 15.0
MAX_TOKENS = 4
HOST = "127.0.0.1"


async def through_http(client: httpx.AsyncClient, prompt: Sequence[int]) -> float:
    """Seconds from the request to the first event, on a connection that is open."""
    body = {"prompt": list(prompt), "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    started_s = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        events = response.aiter_bytes()
        await anext(events)
        first_s = time.perf_counter() - started_s
        async for _ in events:
            pass
    return first_s


async def directly(stream: TokenStreamClient, prompt: Sequence[int]) -> float:
    """The same request to the attention actor itself, past the ingress."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, seed=0)
    started_s = time.perf_counter()
    answers = stream.submit(Request(uuid.uuid4().hex, tuple(prompt), params))
    answer = await answers.get()
    first_s = time.perf_counter() - started_s
    while not is_last(answer):
        answer = await answers.get()
    return first_s


async def nothing(client: httpx.AsyncClient) -> float:
    """A request that neither streams nor reaches the engine: what Serve itself takes."""
    started_s = time.perf_counter()
    (await client.get("/health")).raise_for_status()
    return time.perf_counter() - started_s


async def alternate(url: str, address: str, secret: bytes, prompts: list[list[int]]) -> dict[str, list[float]]:
    """Seconds by way, one of each for every prompt, in an order that turns."""
    stream = await TokenStreamClient.connect(address, secret=secret, ingress_id="benchmark")
    seconds: dict[str, list[float]] = {"http": [], "direct": [], "health": []}
    order = deque(seconds)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        for prompt in prompts:
            order.rotate()
            for way in order:
                match way:
                    case "http":
                        taken_s = await through_http(client, prompt)
                    case "direct":
                        taken_s = await directly(stream, prompt)
                    case _:
                        taken_s = await nothing(client)
                seconds[way].append(taken_s)
    await stream.close()
    return seconds


def measure(count: int, warm_up: int) -> dict[str, Any]:
    """On a cluster and ingress of its own, with one attention actor: every request takes the same way."""
    config = load_config(None, ["attention.replicas=1"])
    port = free_port(HOST, 0)
    prompts = [list(question.question.encode()) for question in fresh_questions(5, count + warm_up)]
    with (
        own_stdout(),
        ray_cluster(config, None),
        stop_signals() as (stop, _),
        Cluster.start(config, on_progress=report) as cluster,
        ingress(config, HOST, port),
    ):
        await_ready(HOST, port, Progress(stop))
        view = ray.get(cluster.controller.ingress_view.remote())
        seconds = asyncio.run(alternate(f"http://{HOST}:{port}", view["attention"][0]["address"], view["secret"], prompts))
        engine = cluster.status()["ttft_ms"]
    return figures({way: values[warm_up:] for way, values in seconds.items()}) | {"engine_ms": engine, "requests": count}


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    added = [http - direct for http, direct in zip(seconds["http"], seconds["direct"], strict=True)]
    named = {f"{way}_ms": values for way, values in (seconds | {"added": added}).items()}
    return {name: {f"p{q}": quantile_ms(values, q) for q in (50, 95)} for name, values in named.items()}


def quantile_ms(values_s: list[float], percent: int) -> float:
    """By nearest rank."""
    ordered = sorted(values_s)
    return round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="requests each way")
    parser.add_argument("--quick", action="store_true", help="60 requests each way")
    args = parser.parse_args(argv)
    count = 60 if args.quick else args.count
    machine = hardware()
    found = measure(count, warm_up=max(10, count // 10))
    for name in ("http_ms", "direct_ms", "added_ms", "health_ms"):
        print(f"{name:12}p50 {found[name]['p50']:7.2f}   p95 {found[name]['p95']:7.2f}")
    command = f"python -m benchmarks.ingress_latency --count {count}"
    print(json.dumps({"date": date.today().isoformat(), "hardware": machine, "command": command} | found))
    if found["added_ms"]["p50"] >= ASKED_MS:
        print(f"the ingress adds {found['added_ms']['p50']} ms (p50), {ASKED_MS:g} at most is asked", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
