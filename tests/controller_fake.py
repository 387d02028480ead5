"""The controller's handle, as an ingress calls it; it can be made to die, and to hang."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from tests.attention_fake import SECRET, FakeAttention


class Method:
    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


class FakeController:
    """`state` starting with no actors is what one knows that has only just begun."""

    def __init__(self, directory: Path, actors: dict[str, FakeAttention], state: str = "ready") -> None:
        self.directory, self.actors, self.state = str(directory), actors, state
        self.lost: list[str] = []
        self.epoch, self.version = 1, 0
        self.views = 0
        self._dead = asyncio.Event()
        self._condition = asyncio.Condition()
        for name in ("ingress_view", "changed", "status", "metrics"):
            setattr(self, name, Method(self._until_dead(getattr(self, f"_{name}"))))

    async def change(self, actors: dict[str, FakeAttention], state: str = "ready", lost: list[str] | None = None) -> None:
        """In the same epoch."""
        async with self._condition:
            self.actors, self.state, self.lost, self.version = actors, state, lost or [], self.version + 1
            self._condition.notify_all()

    def die(self) -> None:
        self._dead.set()

    def _until_dead(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def answer(*args: Any) -> Any:
            answering, dead = asyncio.ensure_future(call(*args)), asyncio.create_task(self._dead.wait())
            try:
                await asyncio.wait((answering, dead), return_when=asyncio.FIRST_COMPLETED)
                if self._dead.is_set():
                    raise RayActorError
                return answering.result()
            finally:
                answering.cancel()
                dead.cancel()

        return answer

    async def _ingress_view(self) -> dict[str, Any]:
        self.views += 1
        model = {"name": "m", "directory": self.directory, "max_context": 64, "vocab_size": 300}
        attention = [{"id": name, "address": actor.address} for name, actor in self.actors.items()]
        return {
            "state": self.state, "epoch": self.epoch, "version": self.version, "secret": SECRET, "model": model,
            "attention": attention, "lost": self.lost,
        }  # fmt: skip

    async def _changed(self, epoch: int, state: str, version: int) -> tuple[int, str]:
        async with self._condition:
            await self._condition.wait_for(lambda: (self.epoch, self.state, self.version) != (epoch, state, version))
        return self.epoch, self.state

    async def _status(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("it hangs")

    _metrics = _status
