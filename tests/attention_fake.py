"""An attention actor without an engine, behind a real token stream: it gives the tokens of `reply`, one at a time, when it is told to."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from actors.token_client import TokenStreamClient
from actors.token_server import TokenStreamServer
from afd_ray.request import FinishReason, KVTicket, Request, TokenOutput

SECRET = b"s" * 32
TIMEOUT_S = 30
NO_TICKETS: Mapping[str, KVTicket] = {}


def token_after(request: Request, position: int) -> int:
    """What any actor gives at this position: a function of prompt, seed and position alone, as the engine's."""
    return (sum(request.prompt_token_ids) * 31 + (request.params.seed or 0) * 17 + position * 7) % 1000


def reply(request: Request) -> list[int]:
    return [token_after(request, position) for position in range(request.params.max_tokens or 0)]


class FakeAttention:
    """`leaving`: gives back every request at once. `refusal`: refuses every request with it."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[Request, list[int]]] = {}
        self.submitted: list[tuple[str, tuple[int, ...]]] = []
        self.tickets: dict[str, KVTicket | None] = {}
        self.aborted: list[str] = []
        self.leaving = False
        self.epoch = 0
        self.refusal: ValueError | None = None
        self.server = TokenStreamServer(self._submit, self._abort, secret=SECRET)
        self.address = ""

    async def start(self) -> "FakeAttention":
        self.address = f"127.0.0.1:{await self.server.start()}"
        return self

    async def die(self) -> None:
        """Like a killed process: every stream breaks, nothing more is said."""
        await self.server.close()
        self.running.clear()

    def step(self, count: int = 1) -> None:
        """The next `count` tokens of every request."""
        for _ in range(count):
            self.server.publish([self._next(request_id) for request_id in list(self.running)])

    def finish(self) -> None:
        while self.running:
            self.step()

    def move_out(self, tickets: Mapping[str, KVTicket] = NO_TICKETS) -> None:
        self.leaving = True
        self.server.hand_over({request_id: tickets.get(request_id) for request_id in self.running})
        self.running.clear()

    def fail(self, reason: str) -> None:
        self.server.move(list(self.running), reason)
        self.running.clear()

    def _next(self, request_id: str) -> TokenOutput:
        request, tokens = self.running[request_id]
        tokens.append(token_after(request, len(tokens)))
        reason: FinishReason | None = "length" if len(tokens) == request.params.max_tokens else None
        if reason:
            del self.running[request_id]
        logprob = None if request.params.logprobs is None else -float(len(tokens))
        return TokenOutput(request_id, tokens[-1], logprob, finish_reason=reason, epoch=self.epoch)

    def _submit(self, request: Request, generated: tuple[int, ...], ticket: KVTicket | None) -> None:
        self.submitted.append((request.id, generated))
        self.tickets[request.id] = ticket
        if self.refusal is not None:
            raise self.refusal
        if self.leaving:
            self.server.move([request.id])
        else:
            self.running[request.id] = (request, list(generated))

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running.pop(request_id, None)


class Relay:
    """A way to an actor that can be cut while both ends live."""

    def __init__(self, to: str) -> None:
        self._to = to
        self._ends: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Breaks what is connected; one may connect anew."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._to.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        self._ends += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(_copy(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await source.read(65536):
            sink.write(data)
    sink.close()


async def connect(address: str) -> TokenStreamClient:
    return await TokenStreamClient.connect(address, secret=SECRET, ingress_id="test", timeout_s=TIMEOUT_S)


async def eventually(condition: Callable[[], bool]) -> None:
    """Asks again and again, with the event loop running in between."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.001)
