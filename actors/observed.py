"""What can be seen of an actor with a step loop: its steps, its calls, its memory."""

import asyncio
from abc import ABC, abstractmethod
from typing import Any

import ray

from actors.aside import aside
from actors.memory import resident_bytes
from actors.tracing import count_calls, trace_steps
from afd_ray.engine.loop import StepLoop
from afd_ray.models.step3 import AttentionHalf, FFNHalf


class Observed(ABC):
    """Control methods run on the actor's event loop."""

    def __init__(self) -> None:
        self._traced_enough = asyncio.Event()

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Where this actor runs."""

    @abstractmethod
    def _ready_loop(self) -> StepLoop:
        """The step loop of the loaded model; RuntimeError before `load`."""

    @abstractmethod
    def _ready_half(self) -> AttentionHalf | FFNHalf:
        """The half of the model that is served; RuntimeError before `load`."""

    @abstractmethod
    def _stages(self, steps: int) -> tuple[str, int]:
        """The stage that counts steps, and how often it runs in that many."""

    def _held(self) -> "list[AttentionHalf | FFNHalf]":
        """Everything of the model in this process."""
        return [self._ready_half()]

    @ray.method
    async def trace(self, steps: int, timeout_s: float) -> dict[str, Any]:
        """The stage events of the next `steps` micro-batches, or of those that came within the timeout or until `end_trace`."""
        self._traced_enough.clear()
        events = await trace_steps(self._ready_loop(), *self._stages(steps), timeout_s, self._traced_enough)
        return self._identity() | {"events": events}

    @ray.method
    async def end_trace(self) -> None:
        """Let a trace under way end with what it has."""
        self._traced_enough.set()

    @ray.method
    async def count_ray_calls(self, steps: int, timeout_s: float) -> dict[str, int]:
        """Calls on the step loop's thread over the next `steps` micro-batches, and how many of them go into Ray."""
        return await count_calls(self._ready_loop(), *self._stages(steps), timeout_s)

    @ray.method
    async def resident_bytes(self) -> dict[str, int]:
        """Memory: resident set of the process, and the weights held."""
        return await aside(resident_bytes, self._held())
