"""Clients that ask again and again, and compare every token with the undisturbed answer as it comes."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from benchmarks._streams import Broken, Refused, body, data_lines

SAMPLED = {"temperature": 0.8, "top_k": 8, "frequency_penalty": 0.2}
"""Few candidates: the sums of tensor-parallel ranks differ from a whole one in the last bits, and between hundreds of candidates, cut by `top_p`, a
draw fell so close to a border that this gave another token, once in all storms."""
LONG_PROMPT, SHORT_PROMPT = 600, 80
RETRYABLE = (429, 500, 502, 503, 504)
KEPT = 40
"""Answers of one client that are remembered with their times."""


class Ask(NamedTuple):
    """What one client wants."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: dict[str, Any]

    def body(self, model: str) -> bytes:
        return body(model, self.prompt, self.max_tokens, **self.sampling)


def asks(seed: int, count: int, vocabulary: int, max_tokens: int) -> list[Ask]:
    """Half of them greedy, half sampled with a seed; one prompt in four is long."""
    rng = random.Random(f"asks {seed}")
    made = []
    for i in range(count):
        length = rng.randint(LONG_PROMPT // 2, LONG_PROMPT) if i % 4 == 3 else rng.randint(1, SHORT_PROMPT)
        sampling = SAMPLED | {"seed": rng.getrandbits(32)} if i % 2 else {}
        made.append(Ask(tuple(rng.choices(range(vocabulary), k=length)), max_tokens, sampling))
    return made


class Retryable(Exception):
    """The server could not go on with this answer, and said so: asking again is right."""


async def tokens(url: str, content: bytes) -> AsyncIterator[int]:
    """One answer, as it comes. Raises Retryable, or RuntimeError for an answer that asking again would not mend."""
    try:
        async with aclosing(data_lines(url, content)) as lines:
            async for line in lines:
                said = json.loads(line)
                if "error" in said:
                    raise Retryable(said["error"]["message"])
                for choice in said["choices"]:
                    for token in choice["token_ids"]:
                        yield token
    except Refused as error:
        raise (Retryable if error.status in RETRYABLE else RuntimeError)(str(error)) from None
    except (Broken, OSError) as error:
        raise Retryable(str(error)) from None


Kind = Literal["wrong", "retryable", "failed", "hung"]


class Mishap(NamedTuple):
    """Something a client did not want."""

    at_s: float
    client: int
    kind: Kind
    what: str


@dataclass(slots=True)
class Answer:
    """One answer in progress, or over. Times are `time.monotonic()`."""

    times_s: list[float]
    """When it was asked for, and when each token came."""
    over: bool = False


@dataclass
class Clients:
    """One for each ask. `expected`: the tokens of the undisturbed answers."""

    url: str
    model: str
    asks: Sequence[Ask]
    expected: Sequence[Sequence[int]]
    hung_after_s: float
    """Without an event."""
    pause_s: float = 0.5
    """Before an ask that was turned away is repeated."""
    mishaps: list[Mishap] = field(default_factory=list)
    answered: int = 0
    tokens: int = 0
    _recent: list[list[Answer]] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: bool = False

    def start(self) -> None:
        self._recent = [[] for _ in self.asks]
        self._tasks = [asyncio.create_task(self._repeat(i)) for i in range(len(self.asks))]

    async def stop(self) -> None:
        """When every answer in progress is over."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def burst(self) -> None:
        """All long prompts at once, beside what goes on."""
        longest = [i for i, ask in enumerate(self.asks) if len(ask.prompt) > SHORT_PROMPT]
        await asyncio.gather(*(self._ask(i, Answer([time.monotonic()])) for i in longest))

    def in_progress(self, at_s: float) -> list[Answer]:
        """Answers that had been asked for at that time, and were not over."""
        return [answer for answer in self.since(at_s) if answer.times_s[0] <= at_s]

    def since(self, at_s: float) -> list[Answer]:
        """Answers that were in progress at that time or later, of those that are remembered."""
        recent = [answer for answers in self._recent for answer in answers]
        return [one for one in recent if not (one.over and one.times_s[-1] < at_s)]

    async def served(self, since_s: float) -> None:
        """Until every client has had a token since then."""
        while not all(answers and self._last_s(answers) > since_s for answers in self._recent):
            self._news.clear()
            await self._news.wait()

    @staticmethod
    def _last_s(answers: Sequence[Answer]) -> float:
        return max((answer.times_s[-1] for answer in answers if len(answer.times_s) > 1), default=0.0)

    async def _repeat(self, client: int) -> None:
        while not self._stopping:
            answer = Answer([time.monotonic()])
            self._recent[client] = [*self._recent[client][1 - KEPT :], answer]
            if not await self._ask(client, answer):
                await asyncio.sleep(self.pause_s)

    async def _ask(self, client: int, answer: Answer) -> bool:
        """Whether the answer came, whole and right."""
        try:
            right = await self._compare(client, answer)
        except Retryable as error:
            self._note(client, "retryable", str(error))
        except TimeoutError:
            self._note(client, "hung", f"no event for {self.hung_after_s:g} s after {len(answer.times_s) - 1} tokens")
        except RuntimeError as error:
            self._note(client, "failed", str(error))
        else:
            self.answered += right
            return right
        finally:
            answer.over = True
        return False

    async def _compare(self, client: int, answer: Answer) -> bool:
        expected, got = self.expected[client], 0
        async with aclosing(tokens(self.url, self.asks[client].body(self.model))) as stream:
            while True:
                async with asyncio.timeout(self.hung_after_s):
                    token = await anext(stream, None)
                if token is None:
                    break
                answer.times_s.append(time.monotonic())
                self.tokens += 1
                self._news.set()
                if got == len(expected) or token != expected[got]:
                    self._note(client, "wrong", f"token {got} is {token}, not {expected[got : got + 1]}")
                    return False
                got += 1
        if got < len(expected):
            self._note(client, "wrong", f"{got} tokens of {len(expected)}")
        return got == len(expected)

    def _note(self, client: int, kind: Kind, what: str) -> None:
        self.mishaps.append(Mishap(time.monotonic(), client, kind, what))
        self._news.set()


async def undisturbed(url: str, model: str, asks: Sequence[Ask]) -> list[list[int]]:
    """What each ask is answered with, all at once, while nothing happens."""

    async def one(ask: Ask) -> list[int]:
        return [token async for token in tokens(url, ask.body(model))]

    return list(await asyncio.gather(*map(one, asks)))
