"""How many fresh questions does the demo model answer right, asked through HTTP chat, 32 at a time?

Bound: every answer right; asked is 95% overall and 90% of each kind (exit code 1 below).
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from typing import Any

import httpx

from afd_ray.demo.evaluate import MAX_ANSWER_TOKENS, Reply, accuracy
from afd_ray.demo.questions import Question, fresh_questions
from benchmarks._machine import hardware
from benchmarks._server import served

ASKED_OVERALL = 0.95
ASKED_OF_EACH_KIND = 0.90
CONCURRENCY = 32
TIMEOUT_S = 120.0


async def ask_all(url: str, questions: Sequence[Question], concurrency: int = CONCURRENCY) -> list[Reply]:
    """The server's answers, in the order of the questions."""
    room = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:

        async def ask(question: Question) -> Reply:
            body = {
                "messages": [{"role": "user", "content": question.question}],
                "temperature": 0,
                "max_tokens": MAX_ANSWER_TOKENS,
            }
            async with room:
                answer = await client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            return Reply(question, answer.json()["choices"][0]["message"]["content"])

        return list(await asyncio.gather(*map(ask, questions)))


@contextmanager
def own_server(overrides: Sequence[str] = ()) -> Iterator[str]:
    """With `key.path=value` overrides of the demo's configuration."""
    with served(*(argument for override in overrides for argument in ("--set", override))) as server:
        yield server.url


def too_low(shares: dict[str, float]) -> dict[str, float]:
    """The shares below what is asked."""
    return {name: share for name, share in shares.items() if share < (ASKED_OVERALL if name == "overall" else ASKED_OF_EACH_KIND)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server (default: one of its own)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for a server of its own; repeatable")
    parser.add_argument("--seed", type=int, default=20_261)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="100 questions")
    args = parser.parse_args(argv)
    count = 100 if args.quick else args.count
    with nullcontext(args.url) if args.url else own_server(args.set) as url:
        replies = asyncio.run(ask_all(url, fresh_questions(args.seed, count)))
    shares = accuracy(replies)
    for name, share in shares.items():
        print(f"{name:12}{share:8.1%}")
    print(json.dumps(report(args.seed, count, shares, args.set)))
    for name, share in too_low(shares).items():
        print(f"{name}: {share:.1%} is too low", file=sys.stderr)
    return 1 if too_low(shares) else 0


def report(seed: int, count: int, shares: dict[str, float], overrides: Sequence[str] = ()) -> dict[str, Any]:
    command = " ".join(
        [f"python -m benchmarks.accuracy --seed {seed} --count {count}", *(f"--set {override}" for override in overrides)]
    )
    return {"date": date.today().isoformat(), "hardware": hardware(), "command": command} | {
        name: round(share, 4) for name, share in shares.items()
    }


if __name__ == "__main__":
    sys.exit(main())
