"""Actors as the controller's shell calls them: they answer at once, but for what a test holds back or makes fail."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from actors.roster import Hand
from placement.planner import Role

Answer = Callable[..., Any]


class Method:
    def __init__(self, hand: "FakeHandle", op: str) -> None:
        self._handle, self._op = hand, op

    async def remote(self, *args: Any) -> Any:
        return await self._handle.answer(self._op, args)


class FakeHandle:
    """`calls`: every call with its arguments."""

    def __init__(self, crew: "FakeCrew", name: str) -> None:
        self._crew, self.name = crew, name
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __getattr__(self, op: str) -> Method:
        return Method(self, op)

    async def answer(self, op: str, args: tuple[Any, ...]) -> Any:
        self.calls.append((op, args))
        crew = self._crew
        if op in crew.held:
            await crew.held[op].wait()
        error = crew.errors.get((op, self.name))
        if error is not None:
            raise error
        if op == "lost":
            return await asyncio.shield(self.ended)
        return {
            "load": {"model_digest": 1, "versions": {}},
            "prepare": {},
            "switch": crew.pause_ms,
            "status": crew.status(self.name),
        }.get(op)


class FakeCrew:
    """In place of `Crew`; members come up at once."""

    uid, secret = "fake", b"s"
    lack: str | None = None

    def __init__(self) -> None:
        self.hands: dict[str, Hand] = {}
        self.held: dict[str, asyncio.Event] = {}
        """Calls that are not answered before the event is set; `provide` too."""
        self.errors: dict[tuple[str, str], Exception] = {}
        """By call and member."""
        self.pause_ms = 7.0
        self.status: Callable[[str], dict[str, Any]] = lambda member: {}

    def __getitem__(self, member: str) -> Hand:
        return self.hands[member]

    def __contains__(self, member: object) -> bool:
        return member in self.hands

    def hold(self, op: str) -> asyncio.Event:
        self.held[op] = asyncio.Event()
        return self.held[op]

    async def provide(self, number: int, attention: Sequence[str], ffn: Sequence[Sequence[str]]) -> None:
        if "provide" in self.held:
            await self.held["provide"].wait()
        for name in (*attention, *(name for group in ffn for name in group)):
            role: Role = "attention" if name.startswith("attention") else "ffn"
            self.hands[name] = Hand(name, role, FakeHandle(self, name), reservation=None)  # type: ignore[arg-type]

    def release(self, members: Sequence[str]) -> list[Hand]:
        return [self.hands.pop(member) for member in members if member in self.hands]

    async def gone(self, hand: Hand) -> None:
        """At once."""

    def spin_hosts(self, members: Sequence[str]) -> int:
        return 1
